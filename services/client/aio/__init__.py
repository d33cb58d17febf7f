"""The asynchronous client. The blocking one (services/client/blocking) is made from it: see make_blocking.py."""
