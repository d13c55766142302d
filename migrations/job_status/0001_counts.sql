-- How far each consumer group has written what it reads, and who may write: a later owner has a higher epoch.
create table positions (
    group_id text not null,
    topic text not null,
    number bigint not null,
    next_offset text not null,
    epoch bigint not null,
    primary key (group_id, topic, number)
);

-- What became of the rows of a run of reverse ETL: of a source (destination '') or at a destination. The id is a digest of the four
-- names, which may be longer than an index takes.
create table counts (
    id text not null primary key,
    job_run text not null,
    task_run text not null,
    source text not null,
    destination text not null,
    taken bigint not null,
    passed bigint not null,
    failed bigint not null,
    changed_at bigint not null
);

create index counts_of_a_run on counts (job_run);

-- Rows that failed for good. The id is a digest of the names and the row's own.
create table failed_rows (
    id text not null primary key,
    job_run text not null,
    task_run text not null,
    source text not null,
    destination text not null,
    record text not null,
    code bigint not null,
    changed_at bigint not null
);

create index failed_rows_of_a_run on failed_rows (job_run);
