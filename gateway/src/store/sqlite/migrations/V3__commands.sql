-- Commands to runners; state: pending, done, refused, expired. created: milliseconds, answered: seconds since 1970.
CREATE TABLE commands (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    session TEXT NOT NULL,
    namespace TEXT NOT NULL,
    name TEXT NOT NULL,
    id TEXT NOT NULL,
    frame TEXT NOT NULL,
    asked TEXT NOT NULL,
    created INTEGER NOT NULL,
    state TEXT NOT NULL,
    error TEXT,
    seq INTEGER,
    answered INTEGER,
    UNIQUE (session, id)
) STRICT;

CREATE INDEX commands_pending ON commands (session, number) WHERE state = 'pending';
CREATE INDEX commands_answered ON commands (answered) WHERE answered IS NOT NULL;
