// All calls of RudderStack's browser SDK in headless Chromium, from a page of another origin: node browser.mjs URL WRITE_KEY
import { createServer } from "node:http";
import { readFile } from "node:fs/promises";
import { chromium } from "playwright-core";

const [url, key] = process.argv.slice(2);
const sdk = await readFile(new URL("./node_modules/@rudderstack/analytics-js/dist/npm/modern/bundled/esm/index.mjs", import.meta.url));
const page = `<!doctype html><title>Shop</title><script type="module">
import { RudderAnalytics } from "/sdk.mjs";
// The SDK posts batches side by side: what is to stay in order waits until what came before was taken.
let taken = 0;
const send = XMLHttpRequest.prototype.send;
XMLHttpRequest.prototype.send = function (body) {
  this.addEventListener("loadend", () => { if (body && this.status === 200) taken += 1; });
  return send.call(this, body);
};
const settled = async (batches) => { while (taken < batches) await new Promise((done) => setTimeout(done, 20)); };
const analytics = new RudderAnalytics();
analytics.load(${JSON.stringify(key)}, ${JSON.stringify(url)}, { configUrl: ${JSON.stringify(url)}, loadIntegration: false,
  queueOptions: { batch: { enabled: true, maxItems: 5, flushInterval: 200 }, minRetryDelay: 200 } });
analytics.identify("u1", { plan: "pro" });
await settled(1);
for (let n = 0; n < 20; n++) {
  analytics.track("Step", { n });
  if (n % 5 === 4) await settled(2 + Math.floor(n / 5));
}
analytics.page("Home");
analytics.group("g1", { name: "Acme" });
analytics.alias("u1", "old");
</script>`;
const server = createServer((request, answer) => {
  const isScript = request.url === "/sdk.mjs";
  answer.setHeader("content-type", isScript ? "text/javascript" : "text/html");
  answer.end(isScript ? sdk : page);
});
await new Promise((done) => server.listen(0, "127.0.0.1", done));
const browser = await chromium.launch({
  executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium",
  args: ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync"],
});
const tab = await browser.newPage();
tab.on("console", (message) => console.error("page:", message.text()));
await tab.goto(`http://127.0.0.1:${server.address().port}/`);
// Whoever started this knows when everything has arrived, and closes its input.
process.stdin.resume();
await new Promise((done) => process.stdin.on("end", done));
await browser.close();
server.close();
