-- grace: the schema of its one SQLite file.
--
-- Two halves. TABLES are durable: a change to them is a numbered migration in grace.py. DERIVED (indexes, triggers,
-- views) is dropped and made again by every upgrade.
--
-- Instants are integer milliseconds since 1970 UTC, durations integer milliseconds, truth is 0 or 1, JSON is text that
-- json_valid accepts. No CHECK compares two instants, because clocks step back; durations are clamped at zero instead.
-- Triggers do two things only: refuse what must never be, and record what has changed. Plain SQLite 3.38 or newer.
--
-- A closed set of more than two words is a chain of OR, not an IN: for a longer IN SQLite makes and fills a table of its
-- own each time that a statement runs, and those tables were a fifth of the cost of writing a task.

-- ============================================================================================================ TABLES

-- What this file knows of itself and what its owner has set; names with a leading underscore are grace's own.
CREATE TABLE settings (
  name       TEXT NOT NULL PRIMARY KEY,           -- 'queue.age_every', '_instance_id', '_events_floor', …
  value      TEXT NOT NULL,                       -- as text; its type is the setting's
  updated_at INTEGER NOT NULL
) STRICT;

-- The rungs of the SLA ladder; a further rung is a row here and a step in grace.py.
CREATE TABLE sla_levels (
  level INTEGER PRIMARY KEY,                      -- 0 none, 1 warning, 2 violated, 3 critical
  name  TEXT NOT NULL UNIQUE,
  topic TEXT                                      -- the event that reaching it writes
) STRICT;

INSERT INTO sla_levels (level, name, topic) VALUES
  (0, 'none', NULL), (1, 'warning', 'htm.sla.warning'), (2, 'violated', 'htm.sla.violated'),
  (3, 'critical', 'htm.sla.critical');

-- The commands that do the work, by name. Tasks name their handler; a removed handler leaves finished tasks readable.
CREATE TABLE handlers (
  name           TEXT NOT NULL PRIMARY KEY CONSTRAINT handler_name CHECK (length(name) BETWEEN 1 AND 64),
  argv           TEXT CONSTRAINT handler_argv CHECK (argv IS NULL OR (json_valid(argv) AND json_array_length(argv) > 0)),
  cwd            TEXT,                            -- where it runs
  env            TEXT NOT NULL DEFAULT '{}' CONSTRAINT handler_env CHECK (json_valid(env)),
  secrets        TEXT NOT NULL DEFAULT '[]' CONSTRAINT handler_secrets CHECK (json_valid(secrets)), -- [[variable, key, action], …]
  external       INTEGER NOT NULL DEFAULT 0 CONSTRAINT handler_external CHECK (external IN (0, 1)),
  paused         INTEGER NOT NULL DEFAULT 0 CONSTRAINT handler_paused CHECK (paused IN (0, 1)),
  sla_ms         INTEGER CONSTRAINT handler_sla CHECK (sla_ms > 0), -- as a person has set it
  adapted_sla_ms INTEGER CONSTRAINT handler_adapted_sla CHECK (adapted_sla_ms > 0), -- what learn.adapt has made of it, in its place
  timeout_ms     INTEGER CONSTRAINT handler_timeout CHECK (timeout_ms > 0),
  kill_after_ms  INTEGER NOT NULL CONSTRAINT handler_kill_after CHECK (kill_after_ms > 0),
  max_attempts   INTEGER NOT NULL CONSTRAINT handler_attempts CHECK (max_attempts > 0),
  max_recoveries INTEGER NOT NULL CONSTRAINT handler_recoveries CHECK (max_recoveries >= 0),
  backoff_ms     INTEGER NOT NULL CONSTRAINT handler_backoff CHECK (backoff_ms > 0),
  concurrency    INTEGER CONSTRAINT handler_concurrency CHECK (concurrency > 0),
  rescue         TEXT,                            -- the handler that rescues its stuck tasks; NULL: the built-in rescue
  warn_at        REAL NOT NULL CONSTRAINT handler_warn_at CHECK (warn_at > 0 AND warn_at <= 1),
  critical_at    REAL NOT NULL CONSTRAINT handler_critical_at CHECK (critical_at >= 1),
  on_critical    TEXT NOT NULL CONSTRAINT handler_on_critical CHECK (on_critical IN ('rescue', 'retry', 'none')),
  created_at     INTEGER NOT NULL,
  updated_at     INTEGER NOT NULL,
  CONSTRAINT handler_has_command_or_is_external CHECK ((argv IS NULL) = (external = 1))
) STRICT;

-- A goal somebody wants met. Its status follows its current task, in the same transaction.
CREATE TABLE intent_records (
  seq                 INTEGER PRIMARY KEY,        -- order of arrival
  intent_id           TEXT NOT NULL UNIQUE CONSTRAINT intent_id_length CHECK (length(intent_id) BETWEEN 1 AND 128),
  htm_task_id         TEXT REFERENCES htm_tasks (task_id) DEFERRABLE INITIALLY DEFERRED, -- its current task
  goal                TEXT NOT NULL CONSTRAINT intent_goal CHECK (length(goal) BETWEEN 1 AND 2000),
  expected_outcome    TEXT,
  domain              TEXT NOT NULL,
  handler             TEXT,                       -- who is to do it; NULL: a command run in the foreground
  priority            TEXT NOT NULL CONSTRAINT intent_priority CHECK
                        (priority = 'critical' OR priority = 'high' OR priority = 'normal' OR priority = 'low'),
  status              TEXT NOT NULL CONSTRAINT intent_status CHECK
                        (status = 'created' OR status = 'dispatched' OR status = 'executing' OR status = 'completed' OR
                         status = 'failed' OR status = 'timeout' OR status = 'cancelled'),
  sla_ms              INTEGER CONSTRAINT intent_sla CHECK (sla_ms > 0),
  sla_met             INTEGER CONSTRAINT intent_sla_met CHECK (sla_met IN (0, 1)),
  success             INTEGER CONSTRAINT intent_success CHECK (success IN (0, 1)),
  confidence          REAL CONSTRAINT intent_confidence CHECK (confidence BETWEEN 0 AND 1),
  risk_level          TEXT CONSTRAINT intent_risk CHECK
                        (risk_level = 'low' OR risk_level = 'medium' OR risk_level = 'high' OR risk_level = 'critical'),
  context             TEXT NOT NULL CONSTRAINT intent_context CHECK (json_valid(context)),
  result              TEXT CONSTRAINT intent_result CHECK (result IS NULL OR json_valid(result)),
  created_at          INTEGER NOT NULL,
  dispatched_at       INTEGER,
  completed_at        INTEGER,                    -- when it reached a final status, whichever
  actual_execution_ms INTEGER,
  created_by          TEXT NOT NULL,
  idempotency_key     TEXT,
  learned_from        INTEGER NOT NULL DEFAULT 0 CONSTRAINT intent_learned_from CHECK (learned_from IN (0, 1)),
  CONSTRAINT intent_final_has_end CHECK
    ((status = 'completed' OR status = 'failed' OR status = 'timeout' OR status = 'cancelled') = (completed_at IS NOT NULL)),
  CONSTRAINT intent_success_is_completed CHECK (success IS NULL OR (success = 1) = (status = 'completed'))
) STRICT;

-- One unit of work. An intent has one current task; a rescue is a child task, a retry is a new task.
CREATE TABLE htm_tasks (
  seq              INTEGER PRIMARY KEY,           -- order of arrival
  task_id          TEXT NOT NULL UNIQUE,
  intent_id        TEXT REFERENCES intent_records (intent_id) DEFERRABLE INITIALLY DEFERRED,
  parent_task_id   TEXT REFERENCES htm_tasks (task_id), -- of a rescue: the stuck task
  retry_of         TEXT REFERENCES htm_tasks (task_id), -- of a retry: the task it replaces
  task_type        TEXT NOT NULL,                 -- the handler's name, 'command', or 'rescue'
  domain           TEXT NOT NULL,
  handler          TEXT,                          -- NULL: a foreground command, or a built-in rescue
  goal             TEXT NOT NULL CONSTRAINT task_goal CHECK (length(goal) BETWEEN 1 AND 2000),
  payload          TEXT NOT NULL CONSTRAINT task_payload CHECK (json_valid(payload)), -- what the handler is told
  status           TEXT NOT NULL CONSTRAINT task_status CHECK
                     (status = 'queued' OR status = 'blocked' OR status = 'assigned' OR status = 'running' OR
                      status = 'completed' OR status = 'failed' OR status = 'timeout' OR status = 'cancelled'),
  reason           TEXT,                          -- a word for why it is in this status
  priority         TEXT NOT NULL CONSTRAINT task_priority CHECK
                     (priority = 'critical' OR priority = 'high' OR priority = 'normal' OR priority = 'low'),
  rank             INTEGER NOT NULL GENERATED ALWAYS AS (CASE priority WHEN 'critical' THEN 0 WHEN 'high' THEN 1
                     WHEN 'normal' THEN 2 ELSE 3 END) STORED,
  priority_reason  TEXT,                          -- why the priority last changed
  order_at         INTEGER NOT NULL,              -- place within its class: the deadline, or queued_at and an allowance
  available_at     INTEGER,                       -- not to be claimed before this instant; NULL: at once
  next_at          INTEGER,                       -- when the ladder, urgency, ageing or available_at needs a look
  aged_at          INTEGER NOT NULL,              -- since when it waits in its class (tasks without an SLA)
  sla_ms           INTEGER CONSTRAINT task_sla CHECK (sla_ms > 0),
  sla_deadline     INTEGER,
  warn_at          REAL NOT NULL CONSTRAINT task_warn_at CHECK (warn_at > 0),
  critical_at      REAL NOT NULL CONSTRAINT task_critical_at CHECK (critical_at > 0),
  escalation_level INTEGER NOT NULL DEFAULT 0 REFERENCES sla_levels (level),
  sla_met          INTEGER CONSTRAINT task_sla_met CHECK (sla_met IN (0, 1)),
  sla_buffer_ms    INTEGER,                       -- deadline minus end; positive is early
  set_aside        TEXT,                          -- why the ladder leaves this row alone
  forecast_at      INTEGER,                       -- when it was foretold that it will miss its SLA
  timeout_ms       INTEGER CONSTRAINT task_timeout CHECK (timeout_ms > 0),
  max_attempts     INTEGER NOT NULL CONSTRAINT task_max_attempts CHECK (max_attempts > 0),
  attempt_number   INTEGER NOT NULL DEFAULT 0 CONSTRAINT task_attempt_number CHECK (attempt_number >= 0),
  recoveries       INTEGER NOT NULL DEFAULT 0 CONSTRAINT task_recoveries CHECK (recoveries >= 0), -- times put back
  deaths           INTEGER NOT NULL DEFAULT 0 CONSTRAINT task_deaths CHECK (deaths >= 0), -- of them: worker died as it ran
  created_at       INTEGER NOT NULL,
  queued_at        INTEGER NOT NULL,              -- when its SLA clock starts
  assigned_at      INTEGER,
  started_at       INTEGER,                       -- the last attempt's start
  finished_at      INTEGER,
  assigned_worker  TEXT,                          -- the last attempt's worker
  attempt_id       TEXT,                          -- the attempt that owns it now
  queue_time_ms    INTEGER CONSTRAINT task_queue_time CHECK (queue_time_ms >= 0),
  execution_time_ms INTEGER CONSTRAINT task_execution_time CHECK (execution_time_ms >= 0),
  total_time_ms    INTEGER CONSTRAINT task_total_time CHECK (total_time_ms >= 0),
  progress         TEXT CONSTRAINT task_progress CHECK (progress IS NULL OR json_valid(progress)),
  result           TEXT CONSTRAINT task_result CHECK (result IS NULL OR json_valid(result)),
  error            TEXT,
  exit_status      INTEGER,                       -- the last attempt's; 128+n for signal n
  updated_at       INTEGER NOT NULL,              -- by the statement that changed the row last, and by whom
  updated_by       TEXT NOT NULL,
  CONSTRAINT task_final_has_end CHECK
    ((status = 'completed' OR status = 'failed' OR status = 'timeout' OR status = 'cancelled') = (finished_at IS NOT NULL)),
  CONSTRAINT task_owned_when_active CHECK
    ((status IN ('assigned', 'running')) = (attempt_id IS NOT NULL)),
  CONSTRAINT task_active_has_worker CHECK (attempt_id IS NULL OR assigned_worker IS NOT NULL),
  CONSTRAINT task_final_has_no_next_step CHECK (finished_at IS NULL OR (next_at IS NULL AND available_at IS NULL)),
  CONSTRAINT task_sla_has_deadline CHECK ((sla_ms IS NULL) = (sla_deadline IS NULL)),
  CONSTRAINT task_rescue_has_parent CHECK (task_type <> 'rescue' OR parent_task_id IS NOT NULL)
) STRICT;

-- One run of a task by one worker. It commits before its process starts; the token is in that process's environment.
CREATE TABLE htm_task_attempts (
  task_id          TEXT NOT NULL REFERENCES htm_tasks (task_id) ON DELETE CASCADE,
  attempt_id       TEXT NOT NULL,
  attempt_number   INTEGER NOT NULL,
  worker_id        TEXT NOT NULL,
  token            TEXT NOT NULL,                 -- random; tells this attempt's processes from all others
  pid              INTEGER,                       -- the process group's leader
  pid_started      INTEGER,                       -- its start time in clock ticks since boot
  boot_id          TEXT,                          -- the boot that pid and pid_started belong to
  lease_ms         INTEGER CONSTRAINT attempt_lease CHECK (lease_ms > 0), -- external workers only
  lease_expires_at INTEGER,
  stop_requested   TEXT,                          -- why its owner is to end it early
  created_at       INTEGER NOT NULL,
  started_at       INTEGER,
  finished_at      INTEGER,
  outcome          TEXT CONSTRAINT attempt_outcome CHECK
                     (outcome = 'completed' OR outcome = 'failed' OR outcome = 'timeout' OR outcome = 'cancelled' OR
                      outcome = 'interrupted' OR outcome = 'lost' OR outcome = 'rescued'),
  ended_by         TEXT,                          -- 'exit', 'TERM', 'KILL', 'command', 'recovery'
  exit_status      INTEGER,
  error            TEXT,
  log_bytes        INTEGER NOT NULL DEFAULT 0,    -- bytes the process wrote
  log_dropped      INTEGER NOT NULL DEFAULT 0,    -- of them not kept
  PRIMARY KEY (task_id, attempt_id),              -- which finds the attempts of a task, too
  CONSTRAINT attempt_end_has_outcome CHECK ((finished_at IS NULL) = (outcome IS NULL))
) STRICT;

-- What a blocked task waits for: each named intent must be completed.
CREATE TABLE task_dependencies (
  task_id   TEXT NOT NULL REFERENCES htm_tasks (task_id) ON DELETE CASCADE,
  intent_id TEXT NOT NULL REFERENCES intent_records (intent_id) ON DELETE CASCADE,
  PRIMARY KEY (task_id, intent_id)
) STRICT;

-- What came of each finished task that was not a rescue, and of imported runs; the learning loop reads it.
CREATE TABLE outcome_records (
  seq              INTEGER PRIMARY KEY,
  task_id          TEXT NOT NULL UNIQUE,
  intent_id        TEXT,
  action_type      TEXT NOT NULL,                 -- intent_DOMAIN
  handler          TEXT,
  domain           TEXT NOT NULL,
  success          INTEGER NOT NULL CONSTRAINT outcome_success CHECK (success IN (0, 1)),
  confidence_score REAL,
  execution_time   REAL,                          -- seconds of the last attempt; NULL: never started
  context          TEXT NOT NULL CONSTRAINT outcome_context CHECK (json_valid(context)),
  created_at       INTEGER NOT NULL,              -- when it ended
  imported         INTEGER NOT NULL DEFAULT 0 CONSTRAINT outcome_imported CHECK (imported IN (0, 1)) -- 1: a run that was no task here
) STRICT;

-- The durable bus. Instants inside grace's own payloads are integer milliseconds and shown as RFC 3339.
CREATE TABLE events (
  seq        INTEGER PRIMARY KEY,
  topic      TEXT NOT NULL CONSTRAINT event_topic CHECK (length(topic) BETWEEN 1 AND 128),
  source     TEXT NOT NULL,                       -- who wrote it
  subject    TEXT,                                -- the id of what it is about; an intent's events count to its task
  created_at INTEGER NOT NULL,
  payload    TEXT NOT NULL CONSTRAINT event_payload CHECK (json_valid(payload))
) STRICT;

-- How far each named reader of the bus has come.
CREATE TABLE event_cursors (
  name       TEXT NOT NULL PRIMARY KEY,
  seq        INTEGER NOT NULL,
  updated_at INTEGER NOT NULL
) STRICT;

-- All-time totals, kept as they change, so that they cost nothing to read and survive retention.
CREATE TABLE counters (
  name  TEXT NOT NULL PRIMARY KEY,
  value INTEGER NOT NULL
) STRICT;

-- How many tasks there are of each kind, kept as they change; an empty handler is a command or a built-in rescue.
CREATE TABLE task_counts (
  handler  TEXT NOT NULL,
  status   TEXT NOT NULL,
  priority TEXT NOT NULL,
  level    INTEGER NOT NULL,
  n        INTEGER NOT NULL,
  PRIMARY KEY (handler, status, priority, level)
) STRICT;

-- What ended in each hour, by kind of task and domain, added to as it happens; it survives the tasks themselves. The coarser levels are
-- summed up from the hours once these are over: of each day and of all time, of each hour for all kinds of a domain, and of each hour and
-- day for all kinds and domains together.
CREATE TABLE htm_metrics (
  level        TEXT NOT NULL CONSTRAINT metrics_level CHECK
                 (level = 'hour' OR level = 'day' OR level = 'ever' OR level = 'hour_domain' OR level = 'hour_all' OR level = 'day_all'),
  starts_at    INTEGER NOT NULL,                  -- the full hour or day (UTC) in which it ended; 0: all time
  task_type    TEXT NOT NULL,                     -- empty: all kinds together
  domain       TEXT NOT NULL,                     -- empty: all domains together
  imported     INTEGER NOT NULL CONSTRAINT metrics_imported CHECK (imported IN (0, 1)), -- 1: runs that were no tasks here
  completed    INTEGER NOT NULL,
  failed       INTEGER NOT NULL,
  timed_out    INTEGER NOT NULL,
  cancelled    INTEGER NOT NULL,
  sla_met      INTEGER NOT NULL,
  sla_missed   INTEGER NOT NULL,
  retried      INTEGER NOT NULL,                  -- those that took more than one attempt
  runs         INTEGER NOT NULL,                  -- completed ones whose execution time is known; its sums follow
  queue_ms     INTEGER NOT NULL,
  execution_ms INTEGER NOT NULL,
  total_ms     INTEGER NOT NULL,
  buffers      INTEGER NOT NULL,                  -- completed ones with an SLA
  buffer_ms    INTEGER NOT NULL,                  -- the sum of theirs
  PRIMARY KEY (level, starts_at, task_type, domain, imported)
) STRICT;

-- How long completed runs took: a histogram for each hour's and day's row of htm_metrics, in buckets that are 4 % wide.
CREATE TABLE htm_durations (
  level     TEXT NOT NULL CONSTRAINT durations_level CHECK (level = 'hour' OR level = 'day'),
  starts_at INTEGER NOT NULL,
  task_type TEXT NOT NULL,
  domain    TEXT NOT NULL,
  imported  INTEGER NOT NULL CONSTRAINT durations_imported CHECK (imported IN (0, 1)),
  bucket    INTEGER NOT NULL,                     -- the whole part of log(ms) / log(1.04); -1 for 0 ms
  n         INTEGER NOT NULL,
  PRIMARY KEY (level, starts_at, task_type, domain, imported, bucket)
) STRICT;

-- The same for the coarser levels, which change once an hour and are read whole: one row each, imported runs left out.
CREATE TABLE htm_histograms (
  level     TEXT NOT NULL CONSTRAINT histograms_level CHECK
                 (level = 'ever' OR level = 'day_kind' OR level = 'day_all' OR level = 'hour_domain' OR level = 'hour_all'),
  starts_at INTEGER NOT NULL,
  task_type TEXT NOT NULL,                        -- empty but for ever and day_kind
  domain    TEXT NOT NULL,                        -- empty but for hour_domain
  histogram TEXT NOT NULL CONSTRAINT histograms_histogram CHECK (json_valid(histogram)), -- [bucket, runs in it, in the next, …]
  runs      INTEGER NOT NULL,                     -- their sum
  p95_ms    REAL NOT NULL,                        -- what 95 % of them do not exceed, within 2 %
  longest   INTEGER NOT NULL,                     -- the last bucket
  PRIMARY KEY (level, starts_at, task_type, domain)
) STRICT;

-- What is out of the ordinary about the outcomes of each hour, by kind of task and domain, imported runs included: reasons of failures, stated
-- confidence, attempts other than one, and what time asleep and interruptions would make wrong in htm_durations. A plain success adds nothing.
CREATE TABLE outcome_tallies (
  starts_at INTEGER NOT NULL,                     -- the full hour (UTC) in which it ended
  task_type TEXT NOT NULL,
  domain    TEXT NOT NULL,
  kind      TEXT NOT NULL CONSTRAINT tally_kind CHECK (kind = 'failure' OR kind = 'confidence' OR kind = 'attempts' OR kind = 'duration'),
  word      TEXT NOT NULL,                        -- the reason; the tenth that the confidence lies in; how many attempts; the bucket
  n         INTEGER NOT NULL,                     -- how many; of durations: to be added to the bucket, or with a minus taken away
  succeeded INTEGER NOT NULL,                     -- of them
  total     INTEGER NOT NULL,                     -- the sum of what is stated (millionths), of the attempts, of the durations (ms)
  squared   INTEGER NOT NULL,                     -- the sum of the squared errors of stated confidence (millionths)
  PRIMARY KEY (starts_at, task_type, domain, kind, word)
) STRICT;

-- What the newest runs of each handler took, summed up now and then, so that a forecast need not; what it was made of are htm_durations.
CREATE TABLE handler_forecasts (
  handler   TEXT NOT NULL PRIMARY KEY,
  runs      INTEGER NOT NULL CONSTRAINT forecast_runs CHECK (runs >= 0), -- that this rests on; too few say nothing
  mean_ms   REAL,
  sd_ms     REAL,                                 -- how widely they are spread
  p50_ms    REAL,
  p90_ms    REAL,
  p95_ms    REAL,
  histogram TEXT NOT NULL CONSTRAINT forecast_histogram CHECK (json_valid(histogram)), -- [[bucket, runs], …], as in htm_durations
  completed INTEGER NOT NULL,                     -- how many of its tasks had been completed when this was made
  made_at   INTEGER NOT NULL,
  CONSTRAINT forecast_has_figures CHECK
    (runs = 0 OR (mean_ms IS NOT NULL AND sd_ms IS NOT NULL AND p50_ms IS NOT NULL AND p90_ms IS NOT NULL AND p95_ms IS NOT NULL))
) STRICT;

-- For how long the machine slept, or by how much its clock was set forward, as some worker noticed: no run is slower for that.
CREATE TABLE suspensions (
  seq       INTEGER PRIMARY KEY,
  woke_at   INTEGER NOT NULL,
  asleep_ms INTEGER NOT NULL CONSTRAINT suspension_length CHECK (asleep_ms > 0)
) STRICT;

-- Daemons and foreground runners. One is alive exactly while it holds the lock on its own file.
CREATE TABLE workers (
  worker_id    TEXT NOT NULL PRIMARY KEY,
  kind         TEXT NOT NULL CONSTRAINT worker_kind CHECK (kind IN ('daemon', 'runner')),
  pid          INTEGER NOT NULL,
  lock_path    TEXT NOT NULL,
  boot_id      TEXT NOT NULL,
  slots        INTEGER NOT NULL,
  state        TEXT NOT NULL CONSTRAINT worker_state CHECK (state IN ('running', 'draining', 'stopping', 'stopped')),
  started_at   INTEGER NOT NULL,
  heartbeat_at INTEGER NOT NULL,
  stopped_at   INTEGER,
  handlers     TEXT CONSTRAINT worker_handlers CHECK
                 (handlers IS NULL OR (json_valid(handlers) AND json_array_length(handlers) > 0)), -- it serves these only
  CONSTRAINT worker_stop_has_instant CHECK ((state = 'stopped') = (stopped_at IS NOT NULL))
) STRICT;

-- Processes that wait for a commit: a datagram to each of these sockets follows every change.
CREATE TABLE waiters (
  path       TEXT NOT NULL PRIMARY KEY,
  pid        INTEGER NOT NULL,
  created_at INTEGER NOT NULL
) STRICT;

-- Rows whose link between intent and task may be broken, noted by the triggers below for the bridge to repair.
CREATE TABLE bridge_suspects (
  seq       INTEGER PRIMARY KEY,
  task_id   TEXT,
  intent_id TEXT
) STRICT;

-- What happened to the vault: leaves of metadata, each holding the hash of the one before it.
CREATE TABLE audit_log (
  seq  INTEGER PRIMARY KEY CONSTRAINT audit_seq CHECK (seq > 0),
  leaf TEXT NOT NULL CONSTRAINT audit_leaf CHECK (json_valid(leaf)), -- canonical JSON; its bytes are what is hashed
  hash TEXT NOT NULL CONSTRAINT audit_hash CHECK (length(hash) = 64)
) STRICT;

-- What approvers have signed of the audit log: its size and head. The signed grants are further anchors.
CREATE TABLE audit_anchors (
  seq       INTEGER PRIMARY KEY,
  document  TEXT NOT NULL CONSTRAINT anchor_document CHECK (json_valid(document)),
  signature BLOB NOT NULL CONSTRAINT anchor_signature CHECK (length(signature) = 64)
) STRICT;

-- The vault's approvers and its machine: numbered lists, each signed by an approver of the list before it.
CREATE TABLE vault_rosters (
  number    INTEGER PRIMARY KEY CONSTRAINT roster_number CHECK (number > 0),
  document  TEXT NOT NULL CONSTRAINT roster_document CHECK (json_valid(document)),
  signature BLOB NOT NULL CONSTRAINT roster_signature CHECK (length(signature) = 64)
) STRICT;

-- What owners have signed so that a rotation can seal a new value without them: a key that can sign and read nothing.
CREATE TABLE secret_delegations (
  seq        INTEGER PRIMARY KEY,
  secret_key TEXT NOT NULL,
  document   TEXT NOT NULL CONSTRAINT delegation_document CHECK (json_valid(document)), -- canonical JSON
  signature  BLOB NOT NULL CONSTRAINT delegation_signature CHECK (length(signature) = 64), -- the owner's
  private    BLOB,                                -- the signing key, wrapped to the machine; NULL once another took its place
  created_at INTEGER NOT NULL
) STRICT;

-- What governance has laid down for the use of secrets: numbered sets of rules, each whole, signed, and naming the one before it.
CREATE TABLE governance_rules (
  number    INTEGER PRIMARY KEY CONSTRAINT rules_number CHECK (number > 0),
  document  TEXT NOT NULL CONSTRAINT rules_document CHECK (json_valid(document)), -- canonical JSON
  signature BLOB NOT NULL CONSTRAINT rules_signature CHECK (length(signature) = 64)
) STRICT;

-- Versions of secrets. The header says whose they are and who must take part in opening them; the seal signs both.
CREATE TABLE secret_entries (
  seq           INTEGER PRIMARY KEY,
  secret_key    TEXT NOT NULL CONSTRAINT secret_key_length CHECK (length(secret_key) BETWEEN 1 AND 128),
  version       INTEGER NOT NULL CONSTRAINT secret_version CHECK (version > 0),
  header        TEXT NOT NULL CONSTRAINT secret_header CHECK (json_valid(header)), -- canonical JSON
  sealed        BLOB,                             -- the encrypted value; NULL once replaced or removed
  sealed_hash   TEXT NOT NULL CONSTRAINT secret_sealed_hash CHECK (length(sealed_hash) = 64), -- which the signature covers
  signature     BLOB NOT NULL CONSTRAINT secret_signature CHECK (length(signature) = 64),
  delegation    INTEGER REFERENCES secret_delegations (seq), -- under which it was sealed, when not by the owner himself
  rotate_reason TEXT,                             -- why this version should be replaced
  rotate_at     INTEGER,                          -- when that is due
  rotate_task   TEXT,                             -- the task that is at it
  created_at    INTEGER NOT NULL,
  removed_at    INTEGER,
  CONSTRAINT secret_removed_is_empty CHECK ((sealed IS NULL) = (removed_at IS NOT NULL)),
  CONSTRAINT secret_version_once UNIQUE (secret_key, version)
) STRICT;

-- The parts of a data key, each wrapped for one member of one group.
CREATE TABLE secret_shares (
  seq         INTEGER PRIMARY KEY,
  secret_key  TEXT NOT NULL,
  version     INTEGER NOT NULL,
  group_name  TEXT NOT NULL CONSTRAINT share_group CHECK (group_name IN ('machine', 'user', 'governance')),
  member      TEXT NOT NULL,                      -- the fingerprint of a key
  share_index INTEGER NOT NULL CONSTRAINT share_index CHECK (share_index > 0),
  wrap        BLOB NOT NULL,
  CONSTRAINT share_of_secret FOREIGN KEY (secret_key, version) REFERENCES secret_entries (secret_key, version),
  CONSTRAINT share_once UNIQUE (secret_key, version, group_name, member)
) STRICT;

-- Requests to use a secret for an action, and what became of them. `request` is what approvers sign for.
CREATE TABLE secret_consent_records (
  seq               INTEGER PRIMARY KEY,
  consent_id        TEXT NOT NULL UNIQUE,
  secret_key        TEXT NOT NULL,
  secret_version    INTEGER NOT NULL,
  consent_status    TEXT NOT NULL CONSTRAINT consent_status CHECK (consent_status IN
                      ('pending', 'approved', 'denied', 'expired', 'revoked', 'used')),
  mode              TEXT NOT NULL CONSTRAINT consent_mode CHECK (mode IN ('once', 'collect', 'standing')),
  request           TEXT NOT NULL CONSTRAINT consent_request CHECK (json_valid(request)), -- canonical JSON
  requester         TEXT NOT NULL,                -- user id and program, by which floods are counted
  pid               INTEGER NOT NULL,             -- the process that asked
  pid_started       INTEGER,                      -- and when it started, in clock ticks since boot
  boot_id           TEXT NOT NULL,
  ephemeral         BLOB,                         -- of a collect request: the private key, sealed to the machine
  task_id           TEXT,                         -- the task that it is for, as the request says
  approval_method   TEXT CONSTRAINT consent_method CHECK (approval_method IN ('auto', 'approver', 'standing', 'template')),
  standing_id       TEXT REFERENCES secret_consent_records (consent_id), -- the standing consent that approved it
  max_uses          INTEGER CONSTRAINT consent_max_uses CHECK (max_uses > 0), -- NULL: of a standing consent, as many as come
  used_count        INTEGER NOT NULL DEFAULT 0 CONSTRAINT consent_used CHECK (used_count BETWEEN 0 AND max_uses),
  requested_at      INTEGER NOT NULL,
  expires_at        INTEGER NOT NULL,             -- answered by then, or not at all
  approved_at       INTEGER,
  grant_expires_at  INTEGER,                      -- used by then, or not at all
  denied_at         INTEGER,
  revoked_at        INTEGER,
  used_at           INTEGER,                      -- the last use
  expired_reason    TEXT CONSTRAINT consent_expired_reason CHECK (expired_reason IN ('unanswered', 'grant_ended')),
  denial_reason     TEXT,
  revocation_reason TEXT,
  observed          TEXT NOT NULL CONSTRAINT consent_observed CHECK (json_valid(observed)), -- by the approvers' own processes
  CONSTRAINT consent_of_secret FOREIGN KEY (secret_key, secret_version) REFERENCES secret_entries (secret_key, version),
  CONSTRAINT consent_spent_is_used CHECK ((consent_status = 'used') = (used_count = max_uses)),
  CONSTRAINT consent_expired_has_reason CHECK ((consent_status = 'expired') = (expired_reason IS NOT NULL)),
  CONSTRAINT consent_denied_has_instant CHECK ((consent_status = 'denied') = (denied_at IS NOT NULL)),
  CONSTRAINT consent_approved_has_end CHECK (consent_status <> 'approved' OR grant_expires_at IS NOT NULL),
  CONSTRAINT consent_many_uses_are_standing CHECK (mode = 'standing' OR (max_uses IS NOT NULL AND max_uses = 1)),
  CONSTRAINT consent_revoked_has_instant CHECK ((consent_status = 'revoked') = (revoked_at IS NOT NULL))
) STRICT;

-- Approvals, each signed: by whom, for which group, and the part of the data key wrapped to the one requester.
CREATE TABLE consent_grants (
  seq        INTEGER PRIMARY KEY,
  consent_id TEXT NOT NULL REFERENCES secret_consent_records (consent_id),
  group_name TEXT NOT NULL CONSTRAINT grant_group CHECK (group_name IN ('user', 'governance')),
  approver   TEXT NOT NULL,                       -- the fingerprint of a key
  document   TEXT NOT NULL CONSTRAINT grant_document CHECK (json_valid(document)), -- canonical JSON
  wrap       BLOB,                                -- NULL when the group has no part, and once it is used or void
  wrap_hash  TEXT,                                -- what the signature covers of it; NULL when the group has no part
  signature  BLOB NOT NULL CONSTRAINT grant_signature CHECK (length(signature) = 64),
  created_at INTEGER NOT NULL,
  CONSTRAINT grant_once UNIQUE (consent_id, group_name, approver)
) STRICT;

-- The parts in a standing consent's grants for a later version of the secret, wrapped and signed by whoever sealed that one.
CREATE TABLE standing_parts (
  consent_id TEXT NOT NULL REFERENCES secret_consent_records (consent_id),
  version    INTEGER NOT NULL,
  group_name TEXT NOT NULL,
  approver   TEXT NOT NULL,                       -- whose grant it continues
  wrap       BLOB NOT NULL,
  signature  BLOB NOT NULL CONSTRAINT standing_signature CHECK (length(signature) = 64),
  PRIMARY KEY (consent_id, version, group_name, approver)
) STRICT;

-- =========================================================================================================== DERIVED

CREATE INDEX task_claim_order ON htm_tasks (handler, rank, order_at, seq)
  WHERE status = 'queued' AND available_at IS NULL;
CREATE INDEX task_not_before ON htm_tasks (available_at) WHERE available_at IS NOT NULL;
CREATE INDEX task_next_step ON htm_tasks (next_at) WHERE next_at IS NOT NULL;
CREATE INDEX task_queued_since ON htm_tasks (queued_at) WHERE status = 'queued' AND available_at IS NULL;
CREATE INDEX task_waiting_consent ON htm_tasks (rank, order_at, seq) WHERE status = 'blocked' AND reason = 'waiting_consent';
CREATE INDEX task_set_aside ON htm_tasks (seq) WHERE set_aside IS NOT NULL AND finished_at IS NULL;
CREATE INDEX task_of_intent ON htm_tasks (intent_id);
CREATE INDEX task_rescues ON htm_tasks (parent_task_id) WHERE parent_task_id IS NOT NULL;
CREATE INDEX task_retries ON htm_tasks (retry_of) WHERE retry_of IS NOT NULL;
CREATE INDEX task_builtin_rescues ON htm_tasks (seq) WHERE task_type = 'rescue' AND handler IS NULL AND finished_at IS NULL;
CREATE INDEX task_beyond_sla ON htm_tasks (escalation_level, sla_deadline) WHERE escalation_level > 0;
CREATE UNIQUE INDEX attempt_open_once ON htm_task_attempts (task_id) WHERE finished_at IS NULL;
CREATE INDEX attempt_open_of_worker ON htm_task_attempts (worker_id) WHERE finished_at IS NULL;
CREATE INDEX attempt_lease ON htm_task_attempts (lease_expires_at) WHERE finished_at IS NULL AND lease_ms IS NOT NULL;
CREATE INDEX dependency_of_intent ON task_dependencies (intent_id);
CREATE INDEX outcome_of_handler ON outcome_records (handler, created_at, execution_time);
CREATE INDEX outcome_of_command ON outcome_records (domain, json(context) ->> 'goal', created_at) WHERE handler IS NULL;
CREATE INDEX event_recovered ON events (created_at) WHERE topic = 'htm.task.recovered';
CREATE INDEX event_subject ON events (subject, seq) WHERE subject IS NOT NULL;
CREATE UNIQUE INDEX intent_key ON intent_records (idempotency_key) WHERE idempotency_key IS NOT NULL;
CREATE INDEX intent_of_task ON intent_records (htm_task_id) WHERE htm_task_id IS NOT NULL;
CREATE INDEX intent_not_learned ON intent_records (seq) WHERE learned_from = 0 AND completed_at IS NOT NULL;
CREATE INDEX worker_not_stopped ON workers (kind) WHERE stopped_at IS NULL;
CREATE INDEX worker_stopped ON workers (kind, stopped_at) WHERE stopped_at IS NOT NULL;
CREATE INDEX consent_open_until ON secret_consent_records (COALESCE(grant_expires_at, expires_at))
  WHERE consent_status IN ('pending', 'approved');
CREATE INDEX audit_of_subject ON audit_log (json(leaf) ->> 'subject');
CREATE INDEX consent_standing ON secret_consent_records (secret_key) WHERE mode = 'standing';
CREATE INDEX consent_under_standing ON secret_consent_records (standing_id) WHERE standing_id IS NOT NULL;
CREATE INDEX secret_rotate_at ON secret_entries (rotate_at) WHERE rotate_at IS NOT NULL;
CREATE INDEX secret_in_rotation ON secret_entries (rotate_task) WHERE rotate_task IS NOT NULL;
CREATE INDEX consent_of_secret_key ON secret_consent_records (secret_key, seq);
CREATE INDEX consent_of_task ON secret_consent_records (task_id, seq) WHERE task_id IS NOT NULL;
CREATE INDEX consent_pending ON secret_consent_records (seq) WHERE consent_status = 'pending';

-- Refuse: steps between statuses that do not exist.
CREATE TRIGGER task_starts_open BEFORE INSERT ON htm_tasks WHEN NEW.status NOT IN ('queued', 'blocked')
BEGIN
  SELECT RAISE(ABORT, 'a task starts queued or blocked');
END;

CREATE TRIGGER task_transition BEFORE UPDATE OF status ON htm_tasks
WHEN OLD.status <> NEW.status AND CASE OLD.status || '>' || NEW.status
  WHEN 'queued>assigned' THEN 0 WHEN 'queued>blocked' THEN 0 WHEN 'queued>cancelled' THEN 0
  WHEN 'blocked>queued' THEN 0 WHEN 'blocked>failed' THEN 0 WHEN 'blocked>cancelled' THEN 0
  WHEN 'assigned>running' THEN 0 WHEN 'assigned>queued' THEN 0 WHEN 'assigned>failed' THEN 0 WHEN 'assigned>cancelled' THEN 0
  WHEN 'running>queued' THEN 0 WHEN 'running>completed' THEN 0 WHEN 'running>failed' THEN 0 WHEN 'running>timeout' THEN 0 WHEN 'running>cancelled' THEN 0
  ELSE 1 END
BEGIN
  SELECT RAISE(ABORT, 'illegal task transition');
END;

CREATE TRIGGER task_final_stays BEFORE UPDATE OF status, reason, finished_at, result, sla_met, escalation_level,
  exit_status, attempt_number ON htm_tasks
WHEN OLD.finished_at IS NOT NULL
BEGIN
  SELECT RAISE(ABORT, 'a final task never changes');
END;

CREATE TRIGGER task_identity BEFORE UPDATE OF task_id, parent_task_id, retry_of, created_at ON htm_tasks
BEGIN
  SELECT RAISE(ABORT, 'the identity of a task never changes');
END;

CREATE TRIGGER intent_transition BEFORE UPDATE OF status ON intent_records
WHEN OLD.status <> NEW.status AND CASE OLD.status || '>' || NEW.status
  WHEN 'created>dispatched' THEN 0 WHEN 'created>cancelled' THEN 0
  WHEN 'dispatched>executing' THEN 0 WHEN 'dispatched>completed' THEN 0 WHEN 'dispatched>failed' THEN 0 WHEN 'dispatched>timeout' THEN 0 WHEN 'dispatched>cancelled' THEN 0
  WHEN 'executing>dispatched' THEN 0 WHEN 'executing>completed' THEN 0 WHEN 'executing>failed' THEN 0 WHEN 'executing>timeout' THEN 0 WHEN 'executing>cancelled' THEN 0
  WHEN 'failed>dispatched' THEN 0
  WHEN 'timeout>dispatched' THEN 0
  WHEN 'cancelled>dispatched' THEN 0
  ELSE 1 END
BEGIN
  SELECT RAISE(ABORT, 'illegal intent transition');
END;

CREATE TRIGGER attempt_ends_once BEFORE UPDATE OF finished_at, outcome ON htm_task_attempts WHEN OLD.finished_at IS NOT NULL
BEGIN
  SELECT RAISE(ABORT, 'an attempt ends once');
END;

-- Refuse: rewriting history. Events leave only below the floor that retention has written.
CREATE TRIGGER event_never_changes BEFORE UPDATE ON events
BEGIN
  SELECT RAISE(ABORT, 'events are append-only');
END;

CREATE TRIGGER event_never_replaced BEFORE INSERT ON events
WHEN NEW.seq IS NOT NULL AND EXISTS (SELECT 1 FROM events WHERE seq = NEW.seq)
BEGIN
  SELECT RAISE(ABORT, 'events are append-only');
END;

CREATE TRIGGER outcome_never_replaced BEFORE INSERT ON outcome_records
WHEN EXISTS (SELECT 1 FROM outcome_records WHERE task_id = NEW.task_id OR seq = NEW.seq)
BEGIN
  SELECT RAISE(ABORT, 'an outcome is recorded once');
END;

CREATE TRIGGER task_never_replaced BEFORE INSERT ON htm_tasks
WHEN EXISTS (SELECT 1 FROM htm_tasks WHERE task_id = NEW.task_id OR seq = NEW.seq)
BEGIN
  SELECT RAISE(ABORT, 'a task is never replaced');
END;

CREATE TRIGGER attempt_never_replaced BEFORE INSERT ON htm_task_attempts
WHEN EXISTS (SELECT 1 FROM htm_task_attempts WHERE task_id = NEW.task_id AND attempt_id = NEW.attempt_id)
BEGIN
  SELECT RAISE(ABORT, 'an attempt is never replaced');
END;

CREATE TRIGGER event_leaves_below_floor BEFORE DELETE ON events
WHEN OLD.seq >= COALESCE((SELECT CAST(value AS INTEGER) FROM settings WHERE name = '_events_floor'), 0)
BEGIN
  SELECT RAISE(ABORT, 'events are append-only above the retention floor');
END;

CREATE TRIGGER outcome_never_changes BEFORE UPDATE ON outcome_records
BEGIN
  SELECT RAISE(ABORT, 'an outcome is recorded once');
END;

-- Refuse: rewriting what happened to the vault, and who was in it.
CREATE TRIGGER audit_never_changes BEFORE UPDATE ON audit_log
BEGIN
  SELECT RAISE(ABORT, 'the audit log is append-only');
END;

CREATE TRIGGER audit_never_shrinks BEFORE DELETE ON audit_log
BEGIN
  SELECT RAISE(ABORT, 'the audit log is append-only');
END;

CREATE TRIGGER audit_grows_by_one BEFORE INSERT ON audit_log
WHEN NEW.seq IS NULL OR NEW.seq <> (SELECT COALESCE(MAX(seq), 0) + 1 FROM audit_log)
BEGIN
  SELECT RAISE(ABORT, 'the audit log grows by one leaf at its end');
END;

CREATE TRIGGER anchor_never_changes BEFORE UPDATE ON audit_anchors
BEGIN
  SELECT RAISE(ABORT, 'anchors are append-only');
END;

CREATE TRIGGER anchor_never_deleted BEFORE DELETE ON audit_anchors
BEGIN
  SELECT RAISE(ABORT, 'anchors are append-only');
END;

CREATE TRIGGER roster_never_changes BEFORE UPDATE ON vault_rosters
BEGIN
  SELECT RAISE(ABORT, 'rosters are append-only');
END;

CREATE TRIGGER roster_never_deleted BEFORE DELETE ON vault_rosters
BEGIN
  SELECT RAISE(ABORT, 'rosters are append-only');
END;

CREATE TRIGGER rules_never_change BEFORE UPDATE ON governance_rules
BEGIN
  SELECT RAISE(ABORT, 'sets of rules are append-only');
END;

CREATE TRIGGER rules_never_deleted BEFORE DELETE ON governance_rules
BEGIN
  SELECT RAISE(ABORT, 'sets of rules are append-only');
END;

CREATE TRIGGER secret_stays BEFORE UPDATE OF secret_key, version, header, sealed_hash, signature, delegation, created_at ON secret_entries
BEGIN
  SELECT RAISE(ABORT, 'a version of a secret never changes');
END;

CREATE TRIGGER delegation_stays BEFORE UPDATE OF secret_key, document, signature, created_at ON secret_delegations
BEGIN
  SELECT RAISE(ABORT, 'a delegation never changes');
END;

CREATE TRIGGER delegation_never_refilled BEFORE UPDATE OF private ON secret_delegations WHEN NEW.private IS NOT NULL
BEGIN
  SELECT RAISE(ABORT, 'a delegation is only ever emptied');
END;

CREATE TRIGGER delegation_never_deleted BEFORE DELETE ON secret_delegations
BEGIN
  SELECT RAISE(ABORT, 'delegations are never deleted');
END;

CREATE TRIGGER delegation_never_replaced BEFORE INSERT ON secret_delegations
WHEN EXISTS (SELECT 1 FROM secret_delegations WHERE seq = NEW.seq)
BEGIN
  SELECT RAISE(ABORT, 'a delegation never changes');
END;

CREATE TRIGGER secret_never_deleted BEFORE DELETE ON secret_entries
BEGIN
  SELECT RAISE(ABORT, 'the header of a secret stays');
END;

CREATE TRIGGER secret_never_refilled BEFORE UPDATE OF sealed, removed_at ON secret_entries WHEN NEW.sealed IS NOT NULL
BEGIN
  SELECT RAISE(ABORT, 'a version of a secret is only ever emptied');
END;

CREATE TRIGGER consent_starts_pending BEFORE INSERT ON secret_consent_records
WHEN NEW.consent_status <> 'pending' OR NEW.used_count <> 0
BEGIN
  SELECT RAISE(ABORT, 'a consent starts pending');
END;

CREATE TRIGGER consent_transition BEFORE UPDATE OF consent_status ON secret_consent_records
WHEN OLD.consent_status <> NEW.consent_status AND NOT (
  (OLD.consent_status = 'pending' AND NEW.consent_status IN ('approved', 'denied', 'expired', 'revoked'))
  OR (OLD.consent_status = 'approved' AND NEW.consent_status IN ('used', 'expired', 'revoked')))
BEGIN
  SELECT RAISE(ABORT, 'illegal consent transition');
END;

CREATE TRIGGER consent_stays BEFORE UPDATE OF consent_id, secret_key, secret_version, mode, request, task_id, max_uses, requested_at, standing_id
ON secret_consent_records
BEGIN
  SELECT RAISE(ABORT, 'what was asked never changes');
END;

CREATE TRIGGER consent_uses_only_grow BEFORE UPDATE OF used_count ON secret_consent_records WHEN NEW.used_count < OLD.used_count
BEGIN
  SELECT RAISE(ABORT, 'a use cannot be taken back');
END;

CREATE TRIGGER consent_never_deleted BEFORE DELETE ON secret_consent_records
BEGIN
  SELECT RAISE(ABORT, 'consents are never deleted');
END;

CREATE TRIGGER grant_stays BEFORE UPDATE OF consent_id, group_name, approver, document, wrap_hash, signature ON consent_grants
BEGIN
  SELECT RAISE(ABORT, 'a grant never changes');
END;

CREATE TRIGGER grant_never_refilled BEFORE UPDATE OF wrap ON consent_grants WHEN NEW.wrap IS NOT NULL
BEGIN
  SELECT RAISE(ABORT, 'a grant is only ever emptied');
END;

CREATE TRIGGER grant_never_deleted BEFORE DELETE ON consent_grants
BEGIN
  SELECT RAISE(ABORT, 'grants are never deleted');
END;

CREATE TRIGGER anchor_never_replaced BEFORE INSERT ON audit_anchors
WHEN EXISTS (SELECT 1 FROM audit_anchors WHERE seq = NEW.seq)
BEGIN
  SELECT RAISE(ABORT, 'anchors are append-only');
END;

CREATE TRIGGER roster_grows_by_one BEFORE INSERT ON vault_rosters
WHEN NEW.number IS NULL OR NEW.number <> (SELECT COALESCE(MAX(number), 0) + 1 FROM vault_rosters)
BEGIN
  SELECT RAISE(ABORT, 'rosters grow by one at their end');
END;

CREATE TRIGGER rules_grow_by_one BEFORE INSERT ON governance_rules
WHEN NEW.number IS NULL OR NEW.number <> (SELECT COALESCE(MAX(number), 0) + 1 FROM governance_rules)
BEGIN
  SELECT RAISE(ABORT, 'sets of rules grow by one at their end');
END;

CREATE TRIGGER secret_never_replaced BEFORE INSERT ON secret_entries
WHEN EXISTS (SELECT 1 FROM secret_entries WHERE seq = NEW.seq OR (secret_key = NEW.secret_key AND version >= NEW.version))
BEGIN
  SELECT RAISE(ABORT, 'a secret only gets newer versions');
END;

CREATE TRIGGER consent_never_replaced BEFORE INSERT ON secret_consent_records
WHEN EXISTS (SELECT 1 FROM secret_consent_records WHERE seq = NEW.seq OR consent_id = NEW.consent_id)
BEGIN
  SELECT RAISE(ABORT, 'a consent is never replaced');
END;

CREATE TRIGGER grant_never_replaced BEFORE INSERT ON consent_grants
WHEN EXISTS (SELECT 1 FROM consent_grants WHERE seq = NEW.seq
  OR (consent_id = NEW.consent_id AND group_name = NEW.group_name AND approver = NEW.approver))
BEGIN
  SELECT RAISE(ABORT, 'a grant is never replaced');
END;

-- Record: each change of a task's status or priority is an event.
CREATE TRIGGER task_created AFTER INSERT ON htm_tasks
BEGIN
  INSERT INTO events (topic, source, subject, created_at, payload)
  VALUES ('htm.task.created', NEW.updated_by, NEW.task_id, NEW.updated_at, json_object('task_id', NEW.task_id,
    'intent_id', NEW.intent_id, 'parent_task_id', NEW.parent_task_id, 'retry_of', NEW.retry_of, 'task_type', NEW.task_type,
    'domain', NEW.domain, 'handler', NEW.handler, 'goal', NEW.goal, 'status', NEW.status, 'reason', NEW.reason,
    'priority', NEW.priority, 'sla_ms', NEW.sla_ms, 'sla_deadline', NEW.sla_deadline));
END;

CREATE TRIGGER task_changed AFTER UPDATE OF status ON htm_tasks WHEN OLD.status <> NEW.status
BEGIN
  INSERT INTO events (topic, source, subject, created_at, payload)
  VALUES (CASE WHEN NEW.finished_at IS NULL THEN 'htm.task.update' ELSE 'htm.task.' || NEW.status END,
    NEW.updated_by, NEW.task_id, NEW.updated_at, json_object('task_id', NEW.task_id, 'intent_id', NEW.intent_id,
    'handler', NEW.handler, 'status', NEW.status, 'previous_status', OLD.status, 'reason', NEW.reason,
    'priority', NEW.priority, 'attempt_number', NEW.attempt_number, 'assigned_worker', NEW.assigned_worker,
    'available_at', NEW.available_at, 'sla_met', CASE NEW.sla_met WHEN 1 THEN json('true') WHEN 0 THEN json('false') END,
    'exit_status', NEW.exit_status, 'error', NEW.error, 'execution_time_ms', NEW.execution_time_ms));
END;

CREATE TRIGGER task_recovered AFTER UPDATE OF recoveries ON htm_tasks WHEN NEW.recoveries > OLD.recoveries
BEGIN
  INSERT INTO events (topic, source, subject, created_at, payload)
  VALUES ('htm.task.recovered', NEW.updated_by, NEW.task_id, NEW.updated_at, json_object('task_id', NEW.task_id,
    'intent_id', NEW.intent_id, 'handler', NEW.handler, 'status', NEW.status, 'recoveries', NEW.recoveries,
    'lost_worker', OLD.assigned_worker));
END;

CREATE TRIGGER task_reprioritised AFTER UPDATE OF priority ON htm_tasks WHEN OLD.priority <> NEW.priority
BEGIN
  INSERT INTO events (topic, source, subject, created_at, payload)
  VALUES ('htm.task.update', NEW.updated_by, NEW.task_id, NEW.updated_at, json_object('task_id', NEW.task_id,
    'intent_id', NEW.intent_id, 'handler', NEW.handler, 'status', NEW.status, 'reason', NEW.priority_reason,
    'priority', NEW.priority, 'previous_priority', OLD.priority));
END;

CREATE TRIGGER task_set_aside AFTER UPDATE OF set_aside ON htm_tasks WHEN OLD.set_aside IS NULL AND NEW.set_aside IS NOT NULL
BEGIN
  INSERT INTO events (topic, source, subject, created_at, payload)
  VALUES ('htm.task.invalid', NEW.updated_by, NEW.task_id, NEW.updated_at, json_object('task_id', NEW.task_id,
    'intent_id', NEW.intent_id, 'handler', NEW.handler, 'status', NEW.status, 'reason', NEW.set_aside));
END;

-- Record: links that somebody has broken, whoever it was.
CREATE TRIGGER task_without_intent AFTER INSERT ON htm_tasks WHEN NEW.intent_id IS NULL
BEGIN
  INSERT INTO bridge_suspects (task_id) VALUES (NEW.task_id);
END;

CREATE TRIGGER task_unlinked AFTER UPDATE OF intent_id ON htm_tasks
WHEN NEW.intent_id IS NULL OR NOT EXISTS (SELECT 1 FROM intent_records WHERE intent_id = NEW.intent_id)
BEGIN
  INSERT INTO bridge_suspects (task_id, intent_id) VALUES (NEW.task_id, OLD.intent_id);
END;

CREATE TRIGGER task_deleted AFTER DELETE ON htm_tasks WHEN OLD.intent_id IS NOT NULL AND OLD.parent_task_id IS NULL
BEGIN
  INSERT INTO bridge_suspects (intent_id) VALUES (OLD.intent_id);
END;

CREATE TRIGGER intent_without_task AFTER INSERT ON intent_records WHEN NEW.htm_task_id IS NULL
BEGIN
  INSERT INTO bridge_suspects (intent_id) VALUES (NEW.intent_id);
END;

CREATE TRIGGER intent_unlinked AFTER UPDATE OF htm_task_id ON intent_records
WHEN NEW.htm_task_id IS NULL OR NOT EXISTS (SELECT 1 FROM htm_tasks WHERE task_id = NEW.htm_task_id)
BEGIN
  INSERT INTO bridge_suspects (task_id, intent_id) VALUES (OLD.htm_task_id, NEW.intent_id);
END;

CREATE TRIGGER intent_deleted AFTER DELETE ON intent_records WHEN OLD.htm_task_id IS NOT NULL
BEGIN
  INSERT INTO bridge_suspects (task_id, intent_id) VALUES (OLD.htm_task_id, OLD.intent_id);
END;

-- Ask: tasks past a threshold of their SLA, finished ones too.
CREATE VIEW violations AS
SELECT t.seq, t.task_id, t.intent_id, t.task_type, t.domain, t.handler, t.priority, t.sla_ms, t.queued_at, t.sla_deadline,
       t.escalation_level, l.name AS level, t.assigned_worker, t.status, t.finished_at, t.created_at,
       (SELECT r.task_id FROM htm_tasks r WHERE r.parent_task_id = t.task_id AND r.task_type = 'rescue' LIMIT 1) AS rescue_task_id
FROM htm_tasks t JOIN sla_levels l ON l.level = t.escalation_level
WHERE t.escalation_level > 0;

-- Ask: how many tasks there are in each status, and in each class of the queue.
CREATE VIEW status_totals AS
SELECT status, SUM(n) AS n FROM task_counts GROUP BY status;

CREATE VIEW queue_depths AS
SELECT priority, SUM(n) AS n FROM task_counts WHERE status = 'queued' GROUP BY priority;
