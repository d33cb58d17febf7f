"""The local stack: NATS, S3 and the four services as processes of this machine, on loopback."""
