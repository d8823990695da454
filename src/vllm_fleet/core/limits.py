"""Every bound of the system in one place. A limit that is reached has a named outcome."""

from __future__ import annotations

# Names -------------------------------------------------------------------------------------------------------------
NAME_LEN_MAX = 64  # instance and fleet names; longer ones are refused
ID_LEN_MAX = 256  # request, transfer and engine ids; vLLM's own are under 100
URL_LEN_MAX = 512
FINGERPRINT_LEN_MAX = 4096

# Fabric wire -------------------------------------------------------------------------------------------------------
PREAUTH_FRAME_BYTES_MAX = 1024  # before a peer has proved the token it may send this much per frame
PREAUTH_S = 5.0  # ... and has this long for the whole handshake
FRAME_BYTES_MAX = 4 << 20  # one control frame: 65,536 copy runs of at most 40 bytes, and some room
CONNECTIONS_MAX = 512  # per endpoint; one more is closed at once
PREAUTH_CONNECTIONS_MAX = 64  # connections that have not authenticated yet; one more is closed at once
REGIONS_MAX = 4096  # regions of one pool: layers x (K, V)
BLOCKS_MAX = 1 << 17  # blocks named by one message
RUNS_MAX = 1 << 16  # copy runs named by one message; longer plans are sent in several
NCCL_ID_BYTES = 128  # an NCCL unique id (NCCL_UNIQUE_ID_BYTES)
NCCL_LANES_MAX = 4  # communicators of one link
NCCL_ID_BYTES_MAX = NCCL_LANES_MAX * NCCL_ID_BYTES  # one id for each
NCCL_STAGING_BYTES_MAX = 63 << 20  # device memory for staging per link and side: under 64 MiB
NCCL_PING_BYTES_MAX = 256  # pattern that proves a communicator
NCCL_CTAS_MAX = 32  # what NCCL takes at most for the setting maxCTAs
NCCL_SESSIONS_MAX = 64  # communicators a worker holds for peers that asked; one more is refused
IOV_MAX = 1024  # segments per readv/sendmsg call (Linux UIO_MAXIOV)

# Connector ---------------------------------------------------------------------------------------------------------
TICKET_BYTES_MAX = 64 << 10  # a signed handoff ticket, encoded
PINS_MAX = 65_536  # transfers one worker holds for peers
PAST_TRANSFERS_MAX = 16_384  # transfers remembered after they ended, so that nobody waits for them
RANKS_MAX = 1024  # workers of one instance
TOKENS_MAX = 1 << 24  # longer than any prompt
TRACES_MAX = 1000  # handoffs a worker remembers for `vllm-fleet trace`
TRACE_RECORDS_MAX = 64  # of one request: it may have several prompts
PEERS_MAX = 1024  # prefill workers one decode worker keeps connections to

# Controller --------------------------------------------------------------------------------------------------------
MEMBERS_MAX = 4096
HISTORY_MAX = 4096  # changes kept for watchers that resume; older ones get a snapshot
WATCHERS_MAX = 1024
WATCH_QUEUE_MAX = 1024  # changes waiting for one watcher; a slower one is cut off and resumes
CONTROL_BODY_BYTES_MAX = 64 << 10
CONTROL_BODY_S = 5.0  # a request body that is not complete by then is refused
CONTROL_QUEUE_MAX = 4096  # requests waiting for their turn, one of each member; one more is refused as busy
CONTROL_BATCH_MAX = 256  # of them, saved with one write
CONTROL_HEAD_BYTES_MAX = 16 << 10  # a request's line and headers
CONTROL_HEADS_KEPT = 2 * MEMBERS_MAX  # of heartbeats, which are the same for hours; and of registrations
CONTROL_HEAD_S = 5.0  # a request's head that is not complete by then is refused
CONTROL_IDLE_S = 60.0  # a connection without a request is closed
CONTROL_LINGER_S = 5.0  # a peer may take so long to read its connection's last answer
CONTROL_PIPELINE_MAX = 8  # requests of one connection that wait for their answers; more are refused
HEARTBEATS_PER_S_MAX = 1000  # of a whole fleet: members of a larger one are told to speak less often
CONTROL_CONNECTIONS_MAX = MEMBERS_MAX + 4096  # members, watchers, questions of groups; one more is closed at once
CONTROL_BACKLOG = 1024  # connections that wait to be accepted: a whole fleet may come at once
CONTROL_FILES_KEPT = 64  # files and sockets that connections leave to the rest of the controller
QUERY_FIELDS_MAX = 16
CONTROL_ANSWER_BYTES_MAX = 40 << 20  # a snapshot: MEMBERS_MAX x 10 KiB, the longest a member can be as JSON
WATCH_LINE_BYTES_MAX = CONTROL_ANSWER_BYTES_MAX  # the longest watch line is a snapshot
STILL_HERE_S = 1.0  # a watch stream says that it lives at least this often
WATCH_WRITE_S = 5.0  # a watcher that takes no bytes for so long is cut off
WATCH_SILENCE_S = 5.0  # a watcher takes a stream that is silent for so long for dead
WATCH_CONNECT_S = 2.0
WATCH_BACKOFF_S_MIN = 0.1  # first pause between two attempts; doubles
WATCH_BACKOFF_S_MAX = 2.0
PAST_LIVES_MAX = 4096  # lives remembered after they left or were replaced; the oldest is forgotten
JOURNAL_RECORD_BYTES_MAX = 128 << 10  # one member at most: a body of CONTROL_BODY_BYTES_MAX, and room
JOURNAL_BYTES_MAX = 4 << 20  # changes appended before the journal is written anew
JOURNAL_RETRY_S = 1.0  # pause between two attempts to save again after the disk failed
ETCD_CALL_S = 2.0  # one call of an etcd, all its endpoints together
ETCD_RETRY_S = 0.25  # pause before an etcd that failed is asked again about who leads
ETCD_START_S = 5.0  # a controller whose etcd does not answer for so long at its start ends with an error
ETCD_VALUE_BYTES_MAX = 512 << 10  # one value; etcd refuses requests over 1.5 MiB
ETCD_ENDPOINTS_MAX = 16
CONTROLLERS_MAX = 8  # controllers of one fleet, of which one leads

# HTTP --------------------------------------------------------------------------------------------------------------
HTTP_HEADS_KEPT = 256  # heads remembered so that the next one like it is not parsed again
HTTP_HEAD_KEPT_BYTES_MAX = 2048  # a longer head is not remembered
TLS_HANDSHAKE_S = 10.0
ANSWER_AHEAD_BYTES_MAX = 256 << 10  # of an instance's answer, held while the client is behind; then reading stops
POOL_IDLE_S = 3.0  # an idle connection is used again for so long: uvicorn, vLLM's server, closes its own after 5 s
STALE_S = 0.5  # a reused connection that breaks so soon, before any answer, had been closed by the server before

# Groups ------------------------------------------------------------------------------------------------------------
GROUPS_MAX = 256  # groups that a controller knows; one more is refused
GROUP_MEMBERS_MAX = 64
GROUP_ID_BYTES_MAX = NCCL_ID_BYTES_MAX  # what rank 0 gives the others; the address of gloo's store is shorter
GROUP_PAST_MAX = 256  # lives of a group's members remembered after they left or were replaced
GROUP_REASON_LEN_MAX = 256  # why an epoch ended, as a member says it
GROUP_POLLS_MAX = 2048  # members' questions that wait for something to happen; one more is refused
GROUP_WAIT_S_MAX = 30.0  # one of them is answered by then, whatever happens
GROUP_LEASE_S = 4.0  # a member that does not ask again for so long is lost to its groups
GROUP_RETURN_S = 0.25  # ... for so long after its connection broke in the middle of a question
GROUP_SUSPECT_S = 3.0  # ... whose instance has been suspect for so long
GROUP_FORGET_S = 60.0  # a group that nobody is in is forgotten after this
GROUP_TICK_S = 0.05  # how often leases and deadlines of groups are looked at
GROUP_GATHER_S_MAX = 60.0  # what members may ask for: how long to wait for others ...
GROUP_FORM_S_MAX = 120.0  # ... and how long joining may take
GROUP_EPOCH_MAX = 1 << 62  # a larger number of an epoch cannot be counted on from

# Router ------------------------------------------------------------------------------------------------------------
REQUEST_BODY_BYTES_MAX = 64 << 20  # a longer body is refused with 413
HEADER_BYTES_MAX = 32 << 10
PREFILL_ANSWER_BYTES_MAX = 16 << 20  # the answer of a prefill instance, kept in memory
ERROR_BODY_BYTES_MAX = 1 << 20
ROUTER_TARGET_BYTES_MAX = 8 << 10  # a longer path and query is refused with 414
ROUTER_HEAD_S = 10.0  # a request's head that is not complete by then is refused with 408
ROUTER_BODY_S = 30.0  # ... and a body, with a second more for each ROUTER_BODY_RATE_MIN bytes that came
ROUTER_BODY_RATE_MIN = 16 << 10
ROUTER_IDLE_S = 75.0  # a client's connection without a request is closed
ROUTER_WRITE_S = 60.0  # a client that takes no byte of its answer for so long is cut off
ROUTER_LINGER_S = 2.0  # a client may take so long to read its connection's last answer
ROUTER_PIPELINE_MAX = 128  # requests that arrive at once on one connection; more are refused
ROUTER_BACKLOG = 1024  # connections that wait to be accepted
ROUTER_CONNECTIONS_MAX = 16_384  # of clients; one more is closed at once
ROUTER_WORKERS_MAX = 64  # processes of one router
WORKER_ASK_S = 1.0  # a worker waits so long for another's part of an answer
WORKER_BACKOFF_S = 0.1  # before a worker that died is started again; doubles with each death within WORKER_STEADY_S
WORKER_BACKOFF_MAX_S = 10.0
WORKER_STEADY_S = 30.0
WORKER_START_S = 30.0  # a worker that does not answer by then is taken for dead
WORKER_STOP_S = 5.0  # beyond what running requests get, a worker may take so long to stop
WORKER_HUNG_S = 10.0  # ... and one that answered, after so long
ROUTER_FILES_KEPT = 256  # files and sockets that clients leave to the rest of the router
HEADERS_MAX = 100  # header lines of one request; more are refused
REQUESTS_MAX = 65_536  # requests one router works on at once, waiting ones too; one more is refused with 503
REQUEST_ID_LEN_MAX = 128  # of a client's X-Request-Id; a longer one is replaced
DECODE_ATTEMPTS_MAX = 3  # instances one request is sent to for its answer: the first and two others
CONNECT_S = 2.0  # opening a connection to an instance
BACKOFF_S = 1.0  # an instance whose breaker opened gets no requests for so long; doubles each time
BACKOFF_MAX_S = 10.0
BREAKER_IN_ROW = 5  # failures in a row that open an instance's breaker; one refused connection does, too
BREAKER_WINDOW_S = 10.0  # ... or so large a share of what it was asked within this time, and at least so many
BREAKER_SHARE = 0.5
BREAKER_TRIES_MIN = 20
SLOW_START_S = 5.0  # an instance that is new, or back, reaches its full share of requests in this time
SLOW_START_SHARE_MIN = 0.1
RETRY_WINDOW_S = 10.0  # requests and retries are counted over this time
RETRIES_FREE = 20  # retries of sick instances in that time that any router may make
RESUMES_MAX = 8  # instances one stream may be cut off by
RESUME_BUFFER_BYTES = 64 << 10  # events of a stream kept as they came, before they are read for their tokens
RESUME_TOKENS_MAX = 1 << 20  # prompt and answer of a stream that can be resumed; longer ones end with an error
IN_FLIGHT_MAX = 4096  # requests a router has at instances at once, unless router.in_flight_max says otherwise
QUEUE_MAX = 1024  # requests that wait for their turn, unless router.queue_max says otherwise
QUEUE_KEYS_MAX = 4096  # callers told apart in the queue; further ones share a place
WATCH_TURN_S = 0.1  # how often waits are looked at: deadlines, first bytes, stalls
ORPHAN_S = 15.0  # members a restarted controller does not know yet stay in use so long
STREAM_TAIL_BYTES_MAX = 1 << 20  # an unfinished event held back; a longer one is passed on in parts
ANSWER_BUFFER_BYTES_MAX = 16 << 20  # of an answer that is no stream, kept so that it can be asked for again
RETRY_AFTER_S = 1  # told to clients that are refused with 503
LATE_PREFILL_S = 2.0  # a prefill that answers after decode has answered in full is waited for so long
TIMELINES_MAX = 1000  # requests whose timeline is kept; the oldest is forgotten
ROUTER_STOP_S = 2.0  # running requests get so long when the router stops
MODELS_CACHE_S = 5.0
PREFIX_TEXT_BYTES_MAX = 64 << 20  # prompts remembered for routing; what was used longest ago is forgotten
PREFIX_TEXTS_MAX = 1 << 17  # ... and branches of them
PREFIX_BLOCKS_MAX = 1 << 20  # KV blocks known from events; further ones are not taken in until others are removed
PREFIX_LABELS_MAX = 1 << 14  # requests whose blocks may still be told; the oldest is forgotten
KV_EVENT_BYTES_MAX = 16 << 20  # one message of KV events; a longer one closes the connection
KV_EVENT_QUEUE_MAX = 4096  # messages waiting at one end; further ones are lost, and asked for again
KV_EVENT_BUFFER_STEPS = 4096  # messages that an instance keeps for who missed them
KV_EVENT_REPLAY_S = 5.0  # asking for them
KV_EVENT_REPLAY_MESSAGES_MAX = 2 * KV_EVENT_BUFFER_STEPS
KV_EVENT_BATCH = 64  # messages taken in at a time, before requests get their turn
GAUGES_POLL_S = 1.0  # how often the router reads how busy instances are
GAUGES_READ_S = 2.0  # one reading
GAUGES_STALE_S = 5.0  # an older reading counts for nothing
METRICS_BODY_BYTES_MAX = 8 << 20  # an instance's /metrics; a longer page is not read
METRICS_S = 2.0  # the controller waits so long for an instance's /metrics
METRICS_AT_ONCE = 16  # instances whose /metrics the controller reads at a time
AUDIT_POLL_S = 1.0
AUDIT_READ_S = 5.0  # one reading of an instance's counters
AUDIT_SETTLE_S = 3.0  # a handoff older than this must show in the decode instance's counters
WARN_EVERY_S = 5.0  # the same warning about the same instance is logged at most so often
KEYS_MAX = 65_536  # API keys of one fleet
KEYS_FILE_BYTES_MAX = 16 << 20
FILES_CHECK_S = 1.0  # files that may change while the router runs (keys, certificate) are looked at so often
ACCESS_QUEUE_MAX = 16_384  # lines of the access log that wait to be written; further ones are dropped and counted
ACCESS_BATCH_S = 0.05  # they are written together at most so often
ACCESS_STOP_S = 2.0  # what waits when the router stops gets so long
SPANS_MAX = 8192  # spans that wait to be sent; further ones are dropped
SPANS_BATCH_MAX = 128  # requests whose spans are sent together
SPANS_SEND_S = 5.0  # one sending of spans
SPANS_STOP_S = 2.0  # ... and of those that wait when the router stops
SPANS_OF_REQUEST_MAX = 32  # attempts of one request that get a span of their own
TENANT_LABELS_MAX = 256  # tenants with metrics of their own; further ones share the label "(others)"
TOP_INSTANCES_S = 1.0  # `vllm-fleet top` waits so long for an instance's /metrics, all being asked at once

# Configuration -----------------------------------------------------------------------------------------------------
CONFIG_FILE_BYTES_MAX = 1 << 20  # a larger fleet.yaml is refused
CONFIG_VALUES_MAX = 100_000  # parts of one value; larger ones are refused

# Launcher ----------------------------------------------------------------------------------------------------------
INSTANCES_MAX = 256
LOG_TAIL_LINES = 40  # lines of a dead child's log that `up` prints
LOG_TAIL_BYTES = 256 << 10  # end of a dead child's log that is searched for its reason
LOG_END_LINES = 400  # of these, when it died long after its start
LOG_FOLLOW_BYTES = 64 << 10  # read from one log per turn when it is shown on the terminal
PORT_TRIES_MAX = 3  # starts of one process whose port was taken between choosing and using it
PROBES_MAX = 16  # health questions in flight at once; the others wait for the next turn
PROBE_S = 2.0  # one health question; a loading server answers late, or not at all
ANSWER_BYTES_MAX = 8 << 20  # answer to one of the launcher's own HTTP questions; 4096 members fit
RUN_RECORD_BYTES_MAX = 4 << 20  # fleet.json
LEFTOVERS_MAX = 4096  # files remembered per process for removal after its death; further ones are left alone
SOCKET_PATH_LEN_MAX = 107  # a unix socket's path (sun_path, Linux)
REMOTE_LOG_BYTES_MAX = 1 << 20  # output kept on a node until it is fetched; the oldest is dropped, and said to be
PLACEMENT_STEPS_MAX = 20_000  # of the search for room in a cluster
RESTART_BACKOFF_S = 0.5  # before the first restart of controller or router; doubles with each
RESTART_BACKOFF_MAX_S = 10.0
