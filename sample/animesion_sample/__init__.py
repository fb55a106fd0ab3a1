"""The embedded sample world: a small, deterministic, drawn booru behind a real HTTP server.

``--sample`` crawls it, in the first steps of the documentation, in demos and in end-to-end tests. It is never presented
as real data. ``world`` plans the posts and makes their files, ``drawing`` draws, and ``server`` serves them over
loopback.
"""
