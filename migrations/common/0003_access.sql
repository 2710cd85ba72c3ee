-- Who tried to get in, from where, and what came of it. No foreign key: an attempt on a session that does not exist is recorded as well.
create table access_record (
    id text not null,
    session_id text,
    user_id text,
    channel text not null,
    source_ip text not null,
    outcome text not null,
    at bigint not null,
    constraint access_record_pk primary key (id),
    constraint access_record_channel check (channel in ('ssh', 'browser', 'api')),
    constraint access_record_outcome check (outcome in ('granted', 'denied', 'not_ready', 'ended', 'limited'))
);

create index access_record_session on access_record (session_id, at);

-- What was done to anything, by whom: written in the transaction that does it. detail never holds a secret.
create table audit_entry (
    id text not null,
    at bigint not null,
    actor_kind text not null,
    actor_id text,
    action text not null,
    subject text not null,
    session_id text,
    user_id text,
    environment_id text,
    detail text,
    constraint audit_entry_pk primary key (id),
    constraint audit_entry_actor check (actor_kind in ('candidate', 'key', 'platform', 'system'))
);

create index audit_entry_session on audit_entry (session_id, at);

-- Keys of platform back ends and staff. Only a keyed hash of the secret part is here. Revoked ones stay: records name them.
create table api_key (
    id text not null,
    name text not null,
    scopes text not null,
    secret_hash text not null,
    created_at bigint not null,
    revoked_at bigint,
    constraint api_key_pk primary key (id)
);

-- Single-use entries for browsers: taken by deleting the row, so that two takers never both have it.
create table ticket (
    id text not null,
    kind text not null,
    secret_hash text not null,
    session_id text not null,
    user_id text not null,
    expires_at bigint not null,
    constraint ticket_pk primary key (id),
    constraint ticket_session_fk foreign key (session_id) references session (id),
    constraint ticket_kind check (kind in ('terminal', 'page'))
);

create index ticket_expiry on ticket (expires_at);

-- Exams as last defined, as the JSON of the API.
create table exam (
    id text not null,
    document text not null,
    updated_at bigint not null,
    constraint exam_pk primary key (id)
);
