CREATE TABLE sessions (
    id        INTEGER PRIMARY KEY,
    uid       TEXT NOT NULL UNIQUE,
    namespace TEXT NOT NULL,
    name      TEXT NOT NULL,
    -- UID of the pod that may write, and how many were admitted
    writer    TEXT NOT NULL,
    epoch     INTEGER NOT NULL,
    -- spool of the newest records; NULL: none stored
    spool     TEXT,
    acked     INTEGER NOT NULL DEFAULT 0,
    last      INTEGER NOT NULL DEFAULT 0,
    ended     INTEGER NOT NULL DEFAULT 0,
    -- seconds since 1970
    created   INTEGER NOT NULL
) STRICT;

CREATE TABLE records (
    -- sessions.id << 32 | seq: one tree, a session's records side by side and in order
    key      INTEGER PRIMARY KEY,
    kind     TEXT NOT NULL,
    attempt  INTEGER NOT NULL,
    turn     INTEGER NOT NULL,
    -- the runner's clock, milliseconds since 1970
    ts       INTEGER NOT NULL,
    checksum INTEGER NOT NULL,
    bytes    BLOB NOT NULL
) STRICT;

-- Records whose seq held other bytes already.
CREATE TABLE conflicts (
    key      INTEGER NOT NULL,
    checksum INTEGER NOT NULL,
    length   INTEGER NOT NULL,
    bytes    BLOB NOT NULL,
    -- seconds since 1970
    received INTEGER NOT NULL,
    UNIQUE (key, checksum, length)
) STRICT;

-- Seqs that a gap record says will never come.
CREATE TABLE missing (
    session INTEGER NOT NULL,
    first   INTEGER NOT NULL,
    last    INTEGER NOT NULL
) STRICT;
CREATE INDEX missing_session ON missing (session);
