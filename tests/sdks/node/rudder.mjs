// All calls of RudderStack's Node SDK: node rudder.mjs URL WRITE_KEY
import RudderAnalytics from "@rudderstack/rudder-sdk-node";
import { everyCall } from "./calls.mjs";

const [url, key] = process.argv.slice(2);
await everyCall(new RudderAnalytics(key, { dataPlaneUrl: url, flushAt: 10, flushInterval: 50 }));
