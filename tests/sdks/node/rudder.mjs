// All calls of RudderStack's Node SDK: node rudder.mjs URL WRITE_KEY
import RudderAnalytics from "@rudderstack/rudder-sdk-node";

const [url, key] = process.argv.slice(2);
const client = new RudderAnalytics(key, { dataPlaneUrl: url, flushAt: 10, flushInterval: 50 });
const call = (kind, message) =>
  new Promise((done, failed) => client[kind](message, (error) => (error ? failed(error) : done())));

// The SDK posts batches side by side: what is to stay in order waits for what came before.
await call("identify", { userId: "u1", traits: { plan: "pro" } });
for (let first = 0; first < 20; first += 5) {
  await Promise.all(
    [0, 1, 2, 3, 4].map((n) => call("track", { userId: "u1", event: "Step", properties: { n: first + n } })),
  );
}
await call("page", { userId: "u1", name: "Home" });
await call("screen", { userId: "u1", name: "Main" });
await call("group", { userId: "u1", groupId: "g1", traits: { name: "Acme" } });
await call("alias", { userId: "u1", previousId: "old" });
