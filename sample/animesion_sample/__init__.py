"""The embedded sample world: a small, deterministic, drawn booru behind a real HTTP server.

It is what ``--sample`` crawls: the newcomer's first command, the demo and the end-to-end test. It is never presented as
real data. ``world`` plans the posts and makes their files, ``drawing`` draws, ``truth`` says what a recipe must do with
each post, ``server`` serves it all over loopback.
"""
