-- Where the sessions of this database run, and what environments are made from there besides their exams' recipes: one row, written by
-- the servers when they start. What is kept warm of anything else is of no use.
create table backend (
    one bigint not null default 1,
    place text not null,
    makes text not null,
    constraint backend_pk primary key (one),
    constraint backend_one check (one = 1)
);
