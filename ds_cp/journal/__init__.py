"""The journal: an append-only file of what a restart needs to go on with resumable requests and to
answer for stored responses. Bytes, files and records alone; no torch, no engine."""
