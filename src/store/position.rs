//! Positions of consumer groups in the log, stored together with what was written: how far each partition is written, who may
//! write, and which topic of which log the offset belongs to.

use std::collections::BTreeMap;
use std::fmt;

use sqlx::AnyConnection;

use crate::model::record::{Offset, Partition, Topic, TopicId};

use super::{Store, StoreError};

/// Whose positions are meant.
#[derive(Clone, Debug)]
pub struct Group {
    pub name: String,
    pub topic: Topic,
}

/// How far a partition is written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Position {
    pub offset: Offset,
    /// None: it was stored by a version that did not store it.
    pub topic_id: Option<TopicId>,
}

impl Position {
    fn of(offset: &str, topic_id: String) -> Option<Self> {
        let topic_id = (!topic_id.is_empty()).then(|| TopicId::new(topic_id));
        Some(Self { offset: Offset::parse(offset)?, topic_id })
    }

    /// Why the log cannot be read from here; none where it can. `end`: behind the partition's last record, asked for after the
    /// position.
    pub fn mismatch(&self, topic: &TopicId, end: Offset) -> Option<Mismatch> {
        match &self.topic_id {
            Some(stored) if stored != topic => {
                Some(Mismatch::AnotherTopic { at: self.offset, stored: stored.clone(), found: topic.clone() })
            }
            _ if self.offset > end => Some(Mismatch::BeyondEnd { at: self.offset, end }),
            _ => None,
        }
    }
}

/// A stored position that is none of the log that is read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Mismatch {
    AnotherTopic {
        at: Offset,
        stored: TopicId,
        found: TopicId,
    },
    /// The topic was created again, or the log has lost its last records.
    BeyondEnd {
        at: Offset,
        end: Offset,
    },
}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Mismatch::AnotherTopic { at, stored, found } => {
                write!(
                    f,
                    "the stored position {at} belongs to another log: it was stored for {stored}, and this is {found}"
                )
            }
            Mismatch::BeyondEnd { at, end } => write!(
                f,
                "the stored position {at} lies beyond the end of the log, {end}: the topic was created again, or has lost records"
            ),
        }
    }
}

/// How far a partition is written, from one place to the next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Move {
    pub partition: Partition,
    /// Of whoever writes.
    pub epoch: i64,
    /// Where the last write ended. None: it is the first.
    pub from: Option<Offset>,
    pub to: Offset,
}

impl Store {
    /// Makes the caller the owner of a partition: who was it before writes nothing more. Its epoch, and the position. A position
    /// without a topic becomes one of this topic, so the caller has to compare it with the log's end before.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn take_over(
        &self,
        group: &Group,
        partition: Partition,
        topic: &TopicId,
    ) -> Result<(i64, Option<Position>), StoreError> {
        let taking = sqlx::query_as(
            "insert into positions (group_id, topic, number, next_offset, epoch, topic_id) values ($1, $2, $3, '', 1, $4) \
             on conflict (group_id, topic, number) do update set epoch = positions.epoch + 1, topic_id = case \
             when positions.topic_id = '' or positions.next_offset = '' then excluded.topic_id else positions.topic_id end \
             returning epoch, next_offset, topic_id",
        )
        .bind(group.name.as_str())
        .bind(group.topic.as_str().to_owned())
        .bind(i64::from(partition.0))
        .bind(topic.as_str());
        let pool = self.pool();
        let row: (i64, String, String) = self.call(async { Ok(taking.fetch_one(&pool).await?) }).await?;
        Ok((row.0, Position::of(&row.1, row.2)))
    }

    /// How far the partitions are written that have a position.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn positions(&self, group: &Group) -> Result<BTreeMap<Partition, Position>, StoreError> {
        let asking =
            sqlx::query_as("select number, next_offset, topic_id from positions where group_id = $1 and topic = $2")
                .bind(group.name.as_str())
                .bind(group.topic.as_str().to_owned());
        let pool = self.pool();
        let rows: Vec<(i64, String, String)> = self.call(async { Ok(asking.fetch_all(&pool).await?) }).await?;
        let position = |(number, offset, topic_id): (i64, String, String)| {
            Some((Partition(u32::try_from(number).ok()?), Position::of(&offset, topic_id)?))
        };
        Ok(rows.into_iter().filter_map(position).collect())
    }

    /// How far a partition is written.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn position(&self, group: &Group, partition: Partition) -> Result<Option<Position>, StoreError> {
        let asking = sqlx::query_as(
            "select next_offset, topic_id from positions where group_id = $1 and topic = $2 and number = $3",
        )
        .bind(group.name.as_str())
        .bind(group.topic.as_str().to_owned())
        .bind(i64::from(partition.0));
        let pool = self.pool();
        let row: Option<(String, String)> = self.call(async { Ok(asking.fetch_optional(&pool).await?) }).await?;
        Ok(row.and_then(|(offset, topic_id)| Position::of(&offset, topic_id)))
    }

    /// Sets positions, in one transaction. An owner writes nothing more until it has taken over again, from here.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn reset(
        &self,
        group: &Group,
        topic: &TopicId,
        to: &BTreeMap<Partition, Offset>,
    ) -> Result<(), StoreError> {
        let setting = async {
            let mut writing = self.begin().await?;
            for (partition, offset) in to {
                sqlx::query(
                    "insert into positions (group_id, topic, number, next_offset, epoch, topic_id) values ($1, $2, $3, $4, 1, $5) \
                     on conflict (group_id, topic, number) do update set next_offset = excluded.next_offset, \
                     epoch = positions.epoch + 1, topic_id = excluded.topic_id",
                )
                .bind(group.name.as_str())
                .bind(group.topic.as_str().to_owned())
                .bind(i64::from(partition.0))
                .bind(offset.to_string())
                .bind(topic.as_str())
                .execute(&mut *writing)
                .await?;
            }
            writing.commit().await?;
            Ok(())
        };
        self.call(setting).await
    }
}

/// Moves positions on, within a transaction: nothing of it holds where one of them has another owner, or has moved.
pub(super) async fn advance(connection: &mut AnyConnection, group: &Group, moves: &[Move]) -> Result<(), StoreError> {
    for it in moves {
        let from = it.from.map_or_else(String::new, |from| from.to_string());
        let moved = sqlx::query(
            "update positions set next_offset = $1 \
             where group_id = $2 and topic = $3 and number = $4 and epoch = $5 and next_offset = $6",
        )
        .bind(it.to.to_string())
        .bind(group.name.clone())
        .bind(group.topic.as_str().to_owned())
        .bind(i64::from(it.partition.0))
        .bind(it.epoch)
        .bind(from)
        .execute(&mut *connection)
        .await?;
        if moved.rows_affected() != 1 {
            return Err(StoreError::Stale);
        }
    }
    Ok(())
}
