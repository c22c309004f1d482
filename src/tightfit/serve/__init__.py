"""An OpenAI-compatible endpoint for the builtin runtime.

`protocol` reads requests and writes answers, `requests` carries them between the event loop and
the engine, `app` is the ASGI application, `server` runs both.
"""
