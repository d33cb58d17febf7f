"""The local stack: NATS, S3, the four services and the gateway as processes of this machine, on loopback."""
