"""What can go wrong between a run and its store."""


class StoreError(ConnectionError):
    """The store did not take something."""


class StoreAway(StoreError):
    """The store does not answer, or not for us now: the same call may work later."""


class Refused(StoreError):
    """The store answered that it will not take this: the same call will fail again."""
