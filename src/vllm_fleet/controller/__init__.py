"""Membership: who is in the fleet, in which life and state. Holds no request data; serving goes on without it."""
