// Every call that a server's SDK has. SDKs post batches side by side: what is to stay in order waits for what came before.
export async function everyCall(client) {
  const call = (kind, message) =>
    new Promise((done, failed) => client[kind](message, (error) => (error ? failed(error) : done())));
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
}
