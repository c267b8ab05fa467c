"""POST /v1/messages, Anthropic's protocol: an adapter over ``ds_cp.api.chat``.

``request`` reads a body, ``blocks`` makes a chat's turns of its messages, ``output`` turns the
answer's events into blocks and those of the protocol, ``route`` is where they meet. ``fields``
lists what is not served.
"""
