-- Which topic of which log a position belongs to: an offset means nothing in another one. Empty: not known, from before this column.
alter table positions add column topic_id text not null default '';
