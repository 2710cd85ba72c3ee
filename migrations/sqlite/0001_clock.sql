-- The one clock: every time in this schema is milliseconds since 1970 as the database tells them, so that replicas whose own clocks differ agree.
create view clock (now_ms) as
select cast(unixepoch('now', 'subsec') * 1000 as integer);
