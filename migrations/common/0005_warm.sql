-- How many environments of an exam are kept warm, and what they are made from (JSON; the text itself is compared).
alter table exam add column warm bigint not null default 0;
alter table exam add column recipe text not null default '';

-- Environments that exist before their session. A claim takes the row away in the statement that finds it, and the same transaction
-- gives the environment to its session: it is in one of the two tables, never in both.
create table warm_environment (
    environment_id text not null,
    exam_id text not null,
    recipe text not null,
    state text not null,
    created_at bigint not null,
    constraint warm_environment_pk primary key (environment_id),
    constraint warm_environment_state check (state in ('making', 'ready', 'ending'))
);

create index warm_environment_claim on warm_environment (exam_id, state, created_at);
