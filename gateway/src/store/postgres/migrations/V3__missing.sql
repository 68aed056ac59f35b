-- In the order in which they are passed; what is passed is forgotten.
DROP INDEX missing_session;
CREATE INDEX missing_order ON missing (session, first, last);
DELETE FROM missing USING sessions WHERE sessions.id = missing.session AND missing.last <= sessions.acked;
