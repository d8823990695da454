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
CONTROL_HEAD_S = 5.0  # a request's head that is not complete by then is refused
CONTROL_IDLE_S = 60.0  # a connection without a request is closed
CONTROL_LINGER_S = 5.0  # a peer may take so long to read its connection's last answer
CONTROL_PIPELINE_MAX = 8  # requests of one connection that wait for their answers; more are refused
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
HEADERS_MAX = 100  # header lines of one request; more are refused
REQUESTS_MAX = 4096  # requests one router works on at once; one more is refused with 503
REQUEST_ID_LEN_MAX = 128  # of a client's X-Request-Id; a longer one is replaced
DECODE_ATTEMPTS_MAX = 3  # instances one request is sent to for its answer: the first and two others
CONNECT_S = 2.0  # opening a connection to an instance
BACKOFF_S = 1.0  # an instance that refused a connection is left alone so long; doubles with each refusal
BACKOFF_MAX_S = 10.0
ORPHAN_S = 15.0  # members a restarted controller does not know yet stay in use so long
STREAM_TAIL_BYTES_MAX = 1 << 20  # an unfinished event held back; a longer one is passed on in parts
ANSWER_BUFFER_BYTES_MAX = 16 << 20  # of an answer that is no stream, kept so that it can be asked for again
RETRY_AFTER_S = 1  # told to clients that are refused with 503
LATE_PREFILL_S = 2.0  # a prefill that answers after decode has answered in full is waited for so long
TIMELINES_MAX = 1000  # requests whose timeline is kept; the oldest is forgotten
ROUTER_STOP_S = 2.0  # running requests get so long when the router stops
MODELS_CACHE_S = 5.0
METRICS_BODY_BYTES_MAX = 8 << 20  # an instance's /metrics; a longer page is not read
METRICS_S = 2.0  # the controller waits so long for an instance's /metrics
METRICS_AT_ONCE = 16  # instances whose /metrics the controller reads at a time
AUDIT_POLL_S = 1.0
AUDIT_READ_S = 5.0  # one reading of an instance's counters
AUDIT_SETTLE_S = 3.0  # a handoff older than this must show in the decode instance's counters
WARN_EVERY_S = 5.0  # the same warning about the same instance is logged at most so often

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
