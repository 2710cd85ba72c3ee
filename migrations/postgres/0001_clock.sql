-- The one clock: every time in this schema is milliseconds since 1970 as the database tells them, so that replicas whose own clocks differ agree.
-- statement_timestamp, because all uses within one statement must agree.
create view clock (now_ms) as
select (extract(epoch from statement_timestamp()) * 1000)::bigint;
