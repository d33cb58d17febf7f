"""gRPC on both sides: the server every service runs, the channels it calls others through, errors on the wire."""
