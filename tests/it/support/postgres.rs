//! Postgres: the one that all tests share, and ones of a test's own that it stops.

use std::time::Duration;

use sqlx::{Connection, Executor};

use super::process::{free_port, services};
use super::unique;

/// A new database in the shared Postgres; `deploy/services up postgres` starts it.
pub async fn database() -> String {
    let port = std::env::var("LANEWAY_POSTGRES_PORT").unwrap_or_else(|_| "15432".into());
    let server = format!("postgres://postgres@127.0.0.1:{port}");
    let connecting = sqlx::PgConnection::connect(&server);
    let mut connection = match tokio::time::timeout(Duration::from_secs(5), connecting).await {
        Ok(Ok(connection)) => connection,
        _ => panic!("this test needs a Postgres on 127.0.0.1:{port}: start it with `deploy/services up postgres`"),
    };
    let name = unique("db").replace('-', "_");
    connection.execute(sqlx::AssertSqlSafe(format!("create database {name}"))).await.expect("created");
    format!("{server}/{name}")
}

pub struct Postgres {
    port: u16,
    folder: tempfile::TempDir,
}

impl Postgres {
    pub fn start() -> Self {
        let postgres = Self { port: free_port(), folder: tempfile::tempdir().expect("a folder") };
        postgres.run("up");
        postgres
    }

    pub fn url(&self) -> String {
        format!("postgres://postgres@127.0.0.1:{}/postgres", self.port)
    }

    pub fn stop(&self) {
        self.run("stop");
    }

    /// With -9.
    pub fn kill(&self) {
        self.run("kill");
    }

    /// With what it has on disk.
    pub fn start_again(&self) {
        self.run("start");
    }

    fn run(&self, what: &str) {
        services(what, "postgres", &[("LANEWAY_POSTGRES_PORT", self.port.to_string())], self.folder.path());
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        self.run("down");
    }
}
