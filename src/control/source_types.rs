//! Which sources have a public write key, because it is part of a web page or of an app. The source definition decides it.

use super::workspace::SourceDefinition;

/// Names of sources whose SDK runs on a server of the customer. In lower case, without blanks and signs.
const SERVER_SOURCES: [&str; 12] =
    ["http", "node", "nodejs", "python", "java", "go", "golang", "ruby", "php", "net", "dotnet", "rust"];
/// Types of source definitions whose events come from servers.
const SERVER_TYPES: [&str; 3] = ["cloud", "server", "warehouse"];
/// Names of sources that run in browsers and apps, whatever type their definition has.
const CLIENT_SOURCES: [&str; 14] = [
    "javascript",
    "android",
    "androidkotlin",
    "kotlin",
    "ios",
    "iosswift",
    "swift",
    "unity",
    "unreal",
    "amp",
    "reactnative",
    "flutter",
    "cordova",
    "roku",
];

impl SourceDefinition {
    /// Whether the write key stays on servers: of server SDKs, webhooks, cloud sources and reverse ETL. False where the definition does not
    /// say it: a wrong true would let the holder of a public key change requests that carry the operator's credentials.
    pub fn has_secret_key(&self) -> bool {
        let name: String = self.name.chars().filter(char::is_ascii_alphanumeric).collect::<String>().to_lowercase();
        if CLIENT_SOURCES.contains(&name.as_str()) {
            return false;
        }
        // Only sources of event streams have an empty category.
        !self.category.is_empty()
            || SERVER_SOURCES.contains(&name.as_str())
            || SERVER_TYPES.contains(&self.kind.to_lowercase().as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_of_browsers_and_apps_are_public() {
        // Name, category, type.
        let cases = [
            ("Javascript", "", "web", false),
            ("Android", "", "android", false),
            ("iOS (Swift)", "", "cloud", false),
            ("React Native", "", "", false),
            ("Something New", "", "web", false),
            ("", "", "", false),
            ("HTTP", "", "", true),
            ("Node", "", "cloud", true),
            (".NET", "", "", true),
            ("Something New", "", "cloud", true),
            ("Stripe", "webhook", "cloud", true),
            ("postgres", "warehouse", "warehouse", true),
            ("facebook_ads", "singer-protocol", "", true),
        ];
        for (name, category, kind, secret) in cases {
            let definition = SourceDefinition {
                name: name.to_owned(),
                category: category.to_owned(),
                kind: kind.to_owned(),
                ..SourceDefinition::default()
            };
            assert_eq!(definition.has_secret_key(), secret, "{name:?} {category:?} {kind:?}");
        }
    }
}
