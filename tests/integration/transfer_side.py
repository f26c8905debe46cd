"""One side of prefill and decode on two workers, as a process: arguments: side, port, settings as JSON, prompts."""

import json
import sys

import torch
import torch.distributed
from torch.distributed import TCPStore

from sarathi import SamplingParams
from sarathi.config.load import make_config
from sarathi.core.block_space_manager import make_block_space_manager
from sarathi.messages import NewRequest
from sarathi.model_executor.parallel.ranks import OneRank
from sarathi.transfer.link import GroupLink
from sarathi.transfer.prefill_decode import Decoder, Prefiller
from sarathi.worker.worker import Worker

GREEDY = SamplingParams(temperature=0.0, max_tokens=64, ignore_eos=True)
CHUNK, OUTPUTS = 16, 9


def main(side: int, port: int, settings: dict, prompts: list[list[int]]) -> None:
    device = None
    if settings["device"] == "cuda":
        device = torch.device("cuda", side)
        torch.cuda.set_device(device)
        settings["device"] = str(device)
    config = make_config(**settings)
    store = TCPStore("127.0.0.1", port, is_master=side == 0)
    torch.distributed.init_process_group(
        "gloo" if device is None else "nccl", store=store, rank=side, world_size=2, device_id=device
    )
    worker = Worker(config, OneRank())
    rows = make_block_space_manager(config.model.attention_backend, worker.capacity)
    link = GroupLink(1 - side)
    if side == 0:
        prefiller = Prefiller(worker, rows, link, CHUNK)
        counts = []
        for number, prompt in enumerate(prompts):
            before = prefiller.num_ranges
            prefiller.run(NewRequest(str(number), tuple(prompt), GREEDY))
            counts.append(prefiller.num_ranges - before)
        print(json.dumps(counts))
    else:
        decoder = Decoder(worker, rows, link)
        received = [decoder.receive() for _ in prompts]
        print(json.dumps([[new.token_ids[-1], *decoder.decode(new, OUTPUTS - 1)] for new in received]))
    worker.check_integrity()
    assert rows.num_used_rows == 0 and not worker.cache.lengths()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3]), json.loads(sys.argv[4]))
