"""Every bound of the system in one place: frames, queues, retries, names. A limit that is reached has a named outcome."""

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
IOV_MAX = 1024  # segments per readv/sendmsg call (Linux UIO_MAXIOV)

# Connector ---------------------------------------------------------------------------------------------------------
TICKET_BYTES_MAX = 64 << 10  # a signed handoff ticket, encoded
PINS_MAX = 65_536  # transfers one worker holds for peers
PEERS_MAX = 1024  # prefill workers one decode worker keeps connections to

# Controller --------------------------------------------------------------------------------------------------------
MEMBERS_MAX = 4096
HISTORY_MAX = 4096  # changes kept for watchers that resume; older ones get a snapshot
WATCHERS_MAX = 1024
WATCH_QUEUE_MAX = 1024  # changes waiting for one watcher; a slower one is cut off and resumes
CONTROL_BODY_BYTES_MAX = 64 << 10

# Router ------------------------------------------------------------------------------------------------------------
REQUEST_BODY_BYTES_MAX = 64 << 20  # a longer body is refused with 413
HEADER_BYTES_MAX = 32 << 10
PREFILL_ANSWER_BYTES_MAX = 16 << 20  # the answer of a prefill instance, kept in memory
ERROR_BODY_BYTES_MAX = 1 << 20

# Launcher ----------------------------------------------------------------------------------------------------------
INSTANCES_MAX = 256
LOG_TAIL_LINES = 40  # lines of a dead child's log that `up` prints
