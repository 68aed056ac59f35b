-- What only gateways on this database know: one proves by it that it is one. One row.
CREATE TABLE peers (secret text NOT NULL);
INSERT INTO peers (secret) VALUES (gen_random_uuid()::text || gen_random_uuid()::text);
