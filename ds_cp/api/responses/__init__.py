"""POST /v1/responses and what is kept of it: an adapter over ``ds_cp.api.chat``.

``request`` reads a body, ``items`` its input, ``turns`` makes a chat's turns of items, ``output``
turns the answer's events into items and those of the protocol, ``store`` keeps responses, ``route``
is where they meet. ``fields`` lists what is not served.
"""
