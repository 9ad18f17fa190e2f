"""Scheduled jobs: a file says what runs when; cron, systemd, Kubernetes or ``serve`` say go."""
