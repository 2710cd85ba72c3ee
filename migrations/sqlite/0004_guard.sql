-- What keys cannot say: an identity is never replaced, a record is never altered or removed.
create trigger session_identity_immutable before update on session
when new.id is not old.id
    or new.user_id is not old.user_id
    or new.exam_id is not old.exam_id
    or new.exam is not old.exam
    or new.created_at is not old.created_at
    or (old.environment_id is not null and new.environment_id is not old.environment_id)
    or (old.started_at is not null and new.started_at is not old.started_at)
    or (old.ended_at is not null and new.ended_at is not old.ended_at)
begin
    select raise(abort, 'session identity is immutable');
end;

create trigger session_moves_forward before update on session
when new.version <= old.version and (new.state is not old.state or new.step is not old.step or new.released_at is not old.released_at)
    or new.version < old.version
    or new.transition_number < old.transition_number
begin
    select raise(abort, 'session moves forward only');
end;

create trigger session_kept before delete on session
begin
    select raise(abort, 'session is never deleted');
end;

create trigger session_transition_unaltered before update on session_transition
begin
    select raise(abort, 'session_transition is append-only');
end;

create trigger session_transition_kept before delete on session_transition
begin
    select raise(abort, 'session_transition is append-only');
end;

create trigger access_record_unaltered before update on access_record
begin
    select raise(abort, 'access_record is append-only');
end;

create trigger audit_entry_unaltered before update on audit_entry
begin
    select raise(abort, 'audit_entry is append-only');
end;

create trigger audit_entry_kept before delete on audit_entry
begin
    select raise(abort, 'audit_entry is append-only');
end;
