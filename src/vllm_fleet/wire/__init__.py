"""Messages, frames, handshake and tickets as sans-IO code: bytes in, messages out."""
