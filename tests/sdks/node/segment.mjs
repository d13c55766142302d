// All calls of Segment's Node SDK: node segment.mjs URL WRITE_KEY
import { Analytics } from "@segment/analytics-node";
import { everyCall } from "./calls.mjs";

const [url, key] = process.argv.slice(2);
const client = new Analytics({ writeKey: key, host: url, flushAt: 5, flushInterval: 50, maxRetries: 10 });
await everyCall(client);
await client.closeAndFlush();
