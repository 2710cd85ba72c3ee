-- What keys cannot say: an identity is never replaced, a record is never altered or removed.
create function refuse() returns trigger language plpgsql as $$
begin
    raise exception '%', tg_argv[0] using errcode = 'integrity_constraint_violation';
end
$$;

create trigger session_identity_immutable before update on session for each row
when (new.id is distinct from old.id
    or new.user_id is distinct from old.user_id
    or new.exam_id is distinct from old.exam_id
    or new.exam is distinct from old.exam
    or new.created_at is distinct from old.created_at
    or (old.environment_id is not null and new.environment_id is distinct from old.environment_id)
    or (old.started_at is not null and new.started_at is distinct from old.started_at)
    or (old.ended_at is not null and new.ended_at is distinct from old.ended_at))
execute function refuse('session identity is immutable');

create trigger session_moves_forward before update on session for each row
when (new.version <= old.version and (new.state is distinct from old.state or new.step is distinct from old.step or new.released_at is distinct from old.released_at)
    or new.version < old.version
    or new.transition_number < old.transition_number)
execute function refuse('session moves forward only');

create trigger session_kept before delete on session for each row
execute function refuse('session is never deleted');

create trigger session_transition_unaltered before update on session_transition for each row
execute function refuse('session_transition is append-only');

create trigger session_transition_kept before delete on session_transition for each row
execute function refuse('session_transition is append-only');

create trigger access_record_unaltered before update on access_record for each row
execute function refuse('access_record is append-only');

create trigger audit_entry_unaltered before update on audit_entry for each row
execute function refuse('audit_entry is append-only');

create trigger audit_entry_kept before delete on audit_entry for each row
execute function refuse('audit_entry is append-only');
