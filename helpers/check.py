"""`--check`: what is wrong with the data, before any weights are read."""

from __future__ import annotations

from helpers.config.backends import Backends
from helpers.config.checks import smallest_edge
from helpers.config.load import Resolved
from helpers.data import preparation
from helpers.data.audit import audit_captions, audit_images, text_side
from helpers.data.audit_report import Audit, as_json_text, as_table
from helpers.files import free_bytes
from helpers.models import loading, published
from helpers.planning import job_of, quieten_libraries, require_writable, small_files_of
from helpers.processes import Processes
from helpers.training import assembly, space


def check(resolved: Resolved, backends: Backends, processes: Processes) -> int:
    """Print what is wrong with the data, and what a run with it would take; no weights are read.

    Returns:
        how many things were found.

    Raises:
        ConfigError: a folder for caches, where the index of the images goes, or for results cannot be written to.
        WeightsError: the model is a file that cannot be used.
    """
    quieten_libraries()
    job = job_of(resolved, backends, processes)
    require_writable(job)
    config, spec = job.config, job.spec
    family, smallest = config.family, smallest_edge(config)
    audited = [
        audit_images(
            entry, family.alignment, not family.upscales, smallest, spec.space, backends.conditioning_of(entry)
        )
        for entry in backends.images
    ]
    captions = [caption for one in audited for caption in one.dataset.captions()]
    prepared = preparation.prepare_captions(spec.text, captions)
    name, revision = small_files_of(job), config.model.revision
    text = text_side(spec.text, name, revision)
    findings = [finding for one in audited for finding in one.findings]
    for one, entry in zip(audited, backends.images):
        findings += audit_captions(one, entry, prepared, text)
    usable = all(one.dataset.records for one in audited)
    sampler = job.sampler([one.dataset for one in audited]) if usable else None
    architecture = loading.at_hand(name, revision, "unet/config.json") or published.architecture(name)
    saved = space.saved_sizes(config, spec, architecture) if architecture else None
    output = sum(need.nbytes for need in space.output_needs(config, saved, None)) if saved else None
    audit = Audit(
        datasets=tuple(audited),
        findings=tuple(findings),
        batches=sampler.batches_by_dataset(0) if sampler else {},
        steps=assembly.ending(config.training, sampler.batches_in_epoch).steps if sampler else None,
        batches_per_step=config.training.gradient_accumulation_steps,
        captions=len(set(captions)),
        embed_bytes=text.embed_bytes(prepared.values(), config.data.text_embeds_storage),
        output_bytes=output,
        free_bytes=free_bytes(config.data.cache_dir),
        not_looked_at=text.not_looked_at,
    )
    print(as_json_text(audit) if config.run.check == "json" else as_table(audit))
    return len(audit.findings)
