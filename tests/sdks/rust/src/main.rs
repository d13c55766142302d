//! All calls of RudderStack's Rust SDK: laneway-sdk-test URL WRITE_KEY

use rudderanalytics::client::RudderAnalytics;
use rudderanalytics::message::{Alias, Batch, BatchMessage, Group, Identify, Message, Page, Screen, Track};
use serde_json::json;

fn main() {
    let mut arguments = std::env::args().skip(1);
    let (Some(url), Some(key)) = (arguments.next(), arguments.next()) else { panic!("usage: URL WRITE_KEY") };
    let client = RudderAnalytics::load(key, url);
    let send = |message: Message| client.send(&message).expect("taken");
    let user = || Some("u1".to_owned());
    send(Message::Identify(Identify { user_id: user(), traits: Some(json!({"plan": "pro"})), ..Default::default() }));
    let track = |n: u32| Track { user_id: user(), event: "Step".into(), properties: Some(json!({"n": n})), ..Default::default() };
    (0..10).for_each(|n| send(Message::Track(track(n))));
    let batch = (10..20).map(|n| BatchMessage::Track(track(n))).collect();
    send(Message::Batch(Batch { batch, ..Default::default() }));
    send(Message::Page(Page { user_id: user(), name: "Home".into(), ..Default::default() }));
    send(Message::Screen(Screen { user_id: user(), name: "Main".into(), ..Default::default() }));
    send(Message::Group(Group { user_id: user(), group_id: "g1".into(), ..Default::default() }));
    send(Message::Alias(Alias { user_id: "u1".into(), previous_id: "old".into(), ..Default::default() }));
}
