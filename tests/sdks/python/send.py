"""All calls of a Python SDK: python send.py rudder|segment URL WRITE_KEY"""

import sys

which, url, key = sys.argv[1:]
errors = []
if which == "rudder":
    import rudderstack.analytics as analytics

    analytics.dataPlaneUrl = url
else:
    import segment.analytics as analytics

    analytics.host = url
analytics.write_key = key
analytics.on_error = lambda error, items: errors.append(error)
analytics.max_retries = 10

analytics.identify("u1", {"plan": "pro"})
for n in range(20):
    analytics.track("u1", "Step", {"n": n})
analytics.page("u1", "docs", "Home")
analytics.screen("u1", "app", "Main")
analytics.group("u1", "g1", {"name": "Acme"})
analytics.alias("old", "u1")
analytics.shutdown()
if errors:
    sys.exit(f"{errors}")
