-- Bytes of the session's records and conflicts.
ALTER TABLE sessions ADD COLUMN bytes INTEGER NOT NULL DEFAULT 0;
-- Records up to this seq were removed, but for `end` records. 0: none.
ALTER TABLE sessions ADD COLUMN removed INTEGER NOT NULL DEFAULT 0;
-- When something was stored last, seconds since 1970.
ALTER TABLE sessions ADD COLUMN touched INTEGER NOT NULL DEFAULT 0;
-- When it was first seen that the session is deleted, seconds since 1970. NULL: it is there.
ALTER TABLE sessions ADD COLUMN gone INTEGER;

UPDATE sessions SET
    touched = max(created, unixepoch()),
    bytes = coalesce((SELECT sum(length(bytes)) FROM records WHERE key > sessions.id << 32 AND key < (sessions.id + 1) << 32), 0)
          + coalesce((SELECT sum(length) FROM conflicts WHERE key > sessions.id << 32 AND key < (sessions.id + 1) << 32), 0);
