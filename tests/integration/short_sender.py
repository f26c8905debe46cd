"""The process of a rank, with steps in which one that computes prompts for others has too little memory."""

import short_rank


class ShortSender(short_rank.ShortWorker):
    short_steps = (0, 3, 4)

    def may_be_short(self) -> bool:
        return self.sending is not None


def main(*descriptors: int) -> None:
    """See sarathi.executor.ranks.process.main."""
    short_rank.main(*descriptors, worker=ShortSender)
