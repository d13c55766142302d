//! The events: track 53 %, page 40 %, identify 7 %, about 1 KB each, users skewed, all decided by a seed.

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use crate::clock::Timestamp;

/// Stands in for what real events carry; brings an event to about a kilobyte.
const CONTEXT: &str = r#""context":{"library":{"name":"laneway-load","version":"1.0.0"},"userAgent":"Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/156.0.0.0 Safari/537.36","locale":"en-GB","timezone":"Europe/London","page":{"path":"/products/lamp","referrer":"https://search.example/","search":"?utm_source=newsletter","title":"A lamp for every desk","url":"https://shop.example/products/lamp?utm_source=newsletter"},"screen":{"width":1920,"height":1080,"density":2},"campaign":{"source":"newsletter","medium":"email","name":"autumn","content":"hero-banner","term":"desk lamp"},"device":{"id":"4f1a0c7e-55b2-4c0e-9d3a-1d7f0f8f2b11","manufacturer":"Example","model":"X1","type":"desktop"},"os":{"name":"Linux","version":"6.1"}}"#;
const PRODUCTS: [&str; 8] = ["Lamp", "Desk", "Chair", "Rug", "Shelf", "Clock", "Vase", "Frame"];

pub struct Mix {
    seed: u64,
    users: usize,
    /// Tells this run's message ids from every other's.
    run: u32,
}

/// One event, before it is sent.
#[derive(Clone, Copy, Debug)]
pub struct Planned {
    pub number: usize,
    pub user: usize,
    /// Its place among the user's events.
    pub seq: u64,
    pub kind: &'static str,
}

impl Mix {
    pub fn new(seed: u64, users: usize, run: u32) -> Self {
        Self { seed, users, run }
    }

    /// What message ids begin with, so that another run's events are told apart.
    pub fn prefix(&self) -> String {
        format!("load-{:08x}-", self.run)
    }

    /// The first `count` events in their order.
    pub fn plan(&self, count: usize) -> impl Iterator<Item = Planned> {
        let mut random = StdRng::seed_from_u64(self.seed);
        let mut seqs = vec![0_u64; self.users];
        let users = self.users;
        (0..count).map(move |number| {
            // Squared: a tenth of the users makes a third of the events.
            let skewed: f64 = random.random_range(0.0_f64..1.0).powi(2);
            let user = ((skewed * users as f64) as usize).min(users - 1);
            seqs[user] += 1;
            let kind = match random.random_range(0..100) {
                0..53 => "track",
                53..93 => "page",
                _ => "identify",
            };
            Planned { number, user, seq: seqs[user], kind }
        })
    }

    /// The event as JSON.
    pub fn render(&self, planned: &Planned, at: Timestamp) -> String {
        let Planned { number, user, seq, kind } = planned;
        let time = at.rfc3339_millis();
        let product = PRODUCTS[number % PRODUCTS.len()];
        let own = match *kind {
            "track" => {
                format!(r#""event":"Product Viewed","properties":{{"product":"{product}","price":{}.5,"#, number % 90)
            }
            "page" => format!(
                r#""name":"Product","properties":{{"product":"{product}","url":"https://shop.example/{number}","#
            ),
            _ => format!(
                r#""traits":{{"email":"user-{user}@shop.example","plan":"pro"}},"userId":"id-{user}","properties":{{"#
            ),
        };
        format!(
            r#"{{"type":"{kind}","messageId":"{}{number}","anonymousId":"user-{user}",{own}"user":{user},"seq":{seq},"sent_us":{}}},{CONTEXT},"integrations":{{"All":true}},"channel":"server","originalTimestamp":"{time}","sentAt":"{time}"}}"#,
            self.prefix(),
            at.micros()
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mix_is_as_stated_and_repeats() {
        let mix = Mix::new(7, 1_000, 1);
        let plan: Vec<Planned> = mix.plan(20_000).collect();
        let share = |kind| plan.iter().filter(|planned| planned.kind == kind).count() as f64 / 200.0;
        assert!((52.0..54.0).contains(&share("track")) && (39.0..41.0).contains(&share("page")));
        let again: Vec<usize> = mix.plan(20_000).map(|planned| planned.user).collect();
        assert!(plan.iter().map(|planned| planned.user).eq(again));
        let sizes: Vec<usize> =
            plan.iter().take(100).map(|planned| mix.render(planned, Timestamp::from_millis(0)).len()).collect();
        assert!(sizes.iter().all(|size| (900..1_200).contains(size)), "{sizes:?}");
        for planned in plan.iter().take(100) {
            let event: serde_json::Value =
                serde_json::from_str(&mix.render(planned, Timestamp::from_millis(0))).expect("JSON");
            assert_eq!(event["properties"]["seq"], planned.seq);
        }
    }
}
