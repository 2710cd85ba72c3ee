-- The closed list of states; is_final is 1 for the two that nothing leaves.
create table session_state (
    name text not null,
    is_final bigint not null,
    constraint session_state_pk primary key (name),
    constraint session_state_is_final_flag check (is_final in (0, 1))
);

insert into session_state (name, is_final) values
    ('created', 0),
    ('initializing', 0),
    ('ready', 0),
    ('running', 0),
    ('terminated', 1),
    ('failed', 1);

-- The lifecycle itself. A change that is not in this table cannot be recorded, and a change that is not recorded cannot be made.
create table legal_transition (
    from_state text not null,
    to_state text not null,
    constraint legal_transition_pk primary key (from_state, to_state),
    constraint legal_transition_from_fk foreign key (from_state) references session_state (name),
    constraint legal_transition_to_fk foreign key (to_state) references session_state (name)
);

insert into legal_transition (from_state, to_state) values
    ('created', 'initializing'),
    ('created', 'failed'),
    ('initializing', 'ready'),
    ('initializing', 'failed'),
    ('ready', 'running'),
    ('ready', 'terminated'),
    ('ready', 'failed'),
    ('running', 'terminated'),
    ('running', 'failed');

-- The closed list of why a session ended. A table, so that a later migration can add a code.
create table reason (
    code text not null,
    constraint reason_pk primary key (code)
);

insert into reason (code) values
    ('submitted'),
    ('time_expired'),
    ('ended_by_staff'),
    ('ended_by_candidate'),
    ('never_started'),
    ('abandoned'),
    ('cancelled'),
    ('start_timeout'),
    ('image_pull_failed'),
    ('unschedulable'),
    ('quota_exceeded'),
    ('environment_crashed'),
    ('environment_lost'),
    ('cluster_unavailable'),
    ('out_of_memory'),
    ('setup_failed'),
    ('internal');

-- Every change of a session's state, numbered from 0 (its making) without a gap. Who made it, and why, is part of the change.
-- user_id stands in the keys: a session cannot be given to somebody else without rewriting its history, which triggers forbid.
create table session_transition (
    session_id text not null,
    user_id text not null,
    number bigint not null,
    previous_number bigint,
    from_state text,
    to_state text not null,
    environment_id text,
    reason_code text,
    reason_details text,
    actor_kind text not null,
    actor_id text,
    at bigint not null,
    constraint session_transition_pk primary key (session_id, number),
    constraint session_transition_outcome_uq unique (session_id, user_id, number, to_state),
    constraint session_transition_legal_fk foreign key (from_state, to_state)
        references legal_transition (from_state, to_state),
    constraint session_transition_chain_fk foreign key (session_id, user_id, previous_number, from_state)
        references session_transition (session_id, user_id, number, to_state),
    constraint session_transition_reason_fk foreign key (reason_code) references reason (code),
    constraint session_transition_start check (
        (number = 0 and previous_number is null and from_state is null and to_state = 'created')
        or (number > 0 and previous_number is not null and previous_number = number - 1 and from_state is not null)
    ),
    constraint session_transition_reason_iff_final check (
        (to_state in ('terminated', 'failed')) = (reason_code is not null)
    ),
    constraint session_transition_actor check (actor_kind in ('candidate', 'key', 'platform', 'system'))
);

-- One candidate's one exam. The exam is kept as it stood when the session was made: changing an exam never changes a session that runs,
-- which is also why exam_id is no foreign key.
create table session (
    id text not null,
    user_id text not null,
    exam_id text not null,
    exam text not null,
    environment_id text,
    state text not null,
    transition_number bigint not null,
    version bigint not null,
    reason_code text,
    reason_details text,
    step bigint not null,
    duration_ms bigint not null,
    start_within_ms bigint not null,
    reconnect_window_ms bigint not null,
    created_at bigint not null,
    initializing_at bigint,
    ready_at bigint,
    started_at bigint,
    ended_at bigint,
    released_at bigint,
    active_at bigint not null,
    updated_at bigint not null,
    constraint session_pk primary key (id),
    constraint session_environment_uq unique (environment_id),
    -- A state is where the last recorded change led: there is no other way to set it.
    constraint session_state_fk foreign key (id, user_id, transition_number, state)
        references session_transition (session_id, user_id, number, to_state),
    constraint session_reason_fk foreign key (reason_code) references reason (code),
    constraint session_step_range check (step between 0 and 15),
    constraint session_limits_positive check (duration_ms > 0 and start_within_ms > 0 and reconnect_window_ms >= 0),
    constraint session_reason_iff_final check ((state in ('terminated', 'failed')) = (reason_code is not null)),
    constraint session_ended_iff_final check ((state in ('terminated', 'failed')) = (ended_at is not null)),
    constraint session_released_after_end check (released_at is null or ended_at is not null),
    constraint session_environment_from_initializing check (
        state in ('created', 'failed') or environment_id is not null
    ),
    constraint session_clock_from_running check (state <> 'running' or started_at is not null)
);

-- A candidate sits one exam at a time. Decided here, because two requests on two replicas see no row of each other.
create unique index session_one_active_per_user on session (user_id)
    where state in ('created', 'initializing', 'ready', 'running');

-- What the lifecycle loop reads every time: few rows of a table that only grows.
create index session_unreleased on session (created_at)
    where released_at is null;

-- Apart from the session, so that a query for sessions never carries a secret; removed some minutes after the session's end.
create table session_credential (
    session_id text not null,
    password_hash text,
    constraint session_credential_pk primary key (session_id),
    constraint session_credential_session_fk foreign key (session_id) references session (id)
);

-- OpenSSH public keys that may log in; position keeps the order in which they were given.
create table session_public_key (
    session_id text not null,
    position bigint not null,
    public_key text not null,
    constraint session_public_key_pk primary key (session_id, position),
    constraint session_public_key_session_fk foreign key (session_id) references session (id)
);
