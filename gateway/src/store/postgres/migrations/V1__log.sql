CREATE TABLE sessions (
    id        bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    uid       text NOT NULL UNIQUE,
    namespace text NOT NULL,
    name      text NOT NULL,
    -- UID of the pod that may write, and how many were admitted
    writer    text NOT NULL DEFAULT '',
    epoch     bigint NOT NULL DEFAULT 0,
    -- address of the gateway that its runner is connected to; NULL: it has none that others could use
    gateway   text,
    -- spool of the newest records; NULL: none stored
    spool     text,
    acked     bigint NOT NULL DEFAULT 0,
    last      bigint NOT NULL DEFAULT 0,
    ended     bigint NOT NULL DEFAULT 0,
    -- records up to this seq were removed, but for `end` records; 0: none
    removed   bigint NOT NULL DEFAULT 0,
    -- of the session's records and conflicts
    bytes     bigint NOT NULL DEFAULT 0,
    -- seconds since 1970: made, last stored to, and first seen deleted (NULL: it is there)
    created   bigint NOT NULL,
    touched   bigint NOT NULL,
    gone      bigint
);

CREATE TABLE records (
    session  bigint NOT NULL,
    seq      bigint NOT NULL,
    kind     text NOT NULL,
    attempt  bigint NOT NULL,
    turn     bigint NOT NULL,
    -- the runner's clock, milliseconds since 1970
    ts       bigint NOT NULL,
    checksum bigint NOT NULL,
    bytes    bytea NOT NULL,
    PRIMARY KEY (session, seq)
);
-- As it came: a part of it can be read without the rest, and nothing is spent on compressing it.
ALTER TABLE records ALTER COLUMN bytes SET STORAGE EXTERNAL;

-- Records whose seq held other bytes already.
CREATE TABLE conflicts (
    session  bigint NOT NULL,
    seq      bigint NOT NULL,
    checksum bigint NOT NULL,
    length   bigint NOT NULL,
    bytes    bytea NOT NULL,
    -- seconds since 1970
    received bigint NOT NULL,
    UNIQUE (session, seq, checksum, length)
);

-- Seqs that a gap record says will never come.
CREATE TABLE missing (
    session bigint NOT NULL,
    first   bigint NOT NULL,
    last    bigint NOT NULL
);
CREATE INDEX missing_session ON missing (session);

-- Commands to runners; state: pending, done, refused, expired. created: milliseconds, answered: seconds since 1970.
CREATE TABLE commands (
    -- taken under the session's lock, so that it grows in the order of commits
    number    bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    session   text NOT NULL,
    namespace text NOT NULL,
    name      text NOT NULL,
    id        text NOT NULL,
    frame     text NOT NULL,
    asked     text NOT NULL,
    created   bigint NOT NULL,
    state     text NOT NULL,
    error     text,
    seq       bigint,
    answered  bigint,
    UNIQUE (session, id)
);
CREATE INDEX commands_pending ON commands (session, number) WHERE state = 'pending';
CREATE INDEX commands_answered ON commands (answered) WHERE answered IS NOT NULL;
