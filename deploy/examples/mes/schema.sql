-- What the example keeps of an inspection line: run once, `psql -f schema.sql`. Names are those of the event's data.

-- One row a part. (source, id) is the CloudEvent's own identity, so that whatever is delivered twice is kept once.
CREATE TABLE verdict (
    source        text        NOT NULL,
    id            text        NOT NULL,
    told_at       timestamptz NOT NULL,          -- when the line decided (`ce_time`)
    line          text        NOT NULL,
    station       text        NOT NULL,
    part_id       text        NOT NULL,
    meas_id       text,
    product_id    text        NOT NULL,
    verdict       text        NOT NULL CHECK (verdict IN ('OK', 'NG', 'REVIEW', 'UNINSPECTED')),
    reason_codes  text[]      NOT NULL,
    worker        text        NOT NULL,
    sequence      bigint      NOT NULL,          -- without a gap per worker and station
    epoch         integer,                       -- fencing epoch of a camera pool; null without one
    data          jsonb       NOT NULL,          -- all of it: views, scores, limits, model
    received_at   timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (source, id)
);
CREATE INDEX verdict_by_part ON verdict (station, part_id);
CREATE INDEX verdict_by_time ON verdict (source, station, told_at);

-- Records that are no verdict, as they came. The reading goes on past them; someone has to look at them.
CREATE TABLE refused (
    topic         text        NOT NULL,
    partition     integer     NOT NULL,
    "offset"      bigint      NOT NULL,
    key           bytea,
    value         bytea,
    headers       jsonb       NOT NULL,          -- name -> bytes in hexadecimal
    error         text        NOT NULL,
    received_at   timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (topic, partition, "offset")
);

-- How far each partition has been read: moved in the transaction that writes what was read.
CREATE TABLE place (
    topic         text        NOT NULL,
    partition     integer     NOT NULL,
    next_offset   bigint      NOT NULL,
    PRIMARY KEY (topic, partition)
);

-- The verdicts to act on. While a worker that lost its cameras has not heard of it, two workers speak of one station: the
-- higher epoch counts, of verdicts of about the same time (Kafka counts epochs anew when a pool stood still for long).
CREATE VIEW verdict_in_force AS
SELECT * FROM verdict AS told
WHERE NOT EXISTS (
    SELECT FROM verdict AS other
    WHERE other.source = told.source AND other.station = told.station AND other.epoch > told.epoch
      AND other.told_at BETWEEN told.told_at - interval '5 minutes' AND told.told_at
);
