import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mechinterp import sites
from mechinterp.errors import SiteError
from mechinterp.sites import KINDS, Site, Sites, resolve

positions = st.one_of(
    st.none(),
    st.integers(-20, 200),
    st.sampled_from(["end", "S2", "IO"]),
    st.lists(st.integers(-20, 200), min_size=2, max_size=4).map(tuple),
)


@st.composite
def any_site(draw: st.DrawFn) -> Site:
    kind = KINDS[draw(st.sampled_from(sorted(KINDS)))]
    heads = draw(
        st.one_of(st.none(), st.integers(0, 31), st.lists(st.integers(0, 31), min_size=2, max_size=3).map(tuple))
    )
    return Site(
        kind.name,
        draw(st.integers(0, 99)) if kind.layered else None,
        heads if kind.head_axis else None,
        draw(positions),
    )


@given(any_site())
def test_a_site_is_read_back_from_its_short_form(site: Site) -> None:
    assert Site.parse(str(site)) == site


@given(any_site())
def test_a_site_is_found_by_its_transformer_lens_name(site: Site) -> None:
    if site.tl_name is not None:
        assert Site.parse(site.tl_name) == site.whole


def test_module_paths_name_what_a_forward_hook_there_would_see() -> None:
    assert Site.parse("model.layers.3") == Site("resid_post", 3)
    assert Site.parse("model.layers.3.self_attn") == Site("attn_out", 3)
    assert Site.parse("model.layers.3.self_attn.o_proj") == Site("attn_out", 3)
    assert Site.parse("model.layers.3.self_attn.k_proj") == Site("k", 3)
    assert Site.parse("model.layers.3.mlp") == Site("mlp_out", 3)
    assert Site.parse("model.norm") == Site("final_norm")
    assert Site.parse("lm_head") == Site("logits")


def test_constructors_make_one_or_many() -> None:
    assert sites.resid_post(4, positions="end") == Site("resid_post", 4, positions="end")
    assert sites.resid_post() == Sites("resid_post")
    assert resolve(sites.z([2, 5], heads=[0, 1]), 8) == (Site("z", 2, (0, 1)), Site("z", 5, (0, 1)))
    assert resolve("pattern", 3) == tuple(Site("pattern", i) for i in range(3))
    assert resolve(["embed", sites.q(1), "blocks.0.hook_mlp_out"], 3) == (
        Site("embed"),
        Site("q", 1),
        Site("mlp_out", 0),
    )
    assert sites.pattern(1, positions="all") == sites.pattern(1)


@pytest.mark.parametrize(
    ("text", "near"),
    [
        ("resid_pots.3", "resid_post"),
        ("blocks.3.hook_resid_pst", "hook_resid_post"),
        ("model.layers.3.self_atn", "self_attn"),
        ("paterns", "pattern"),
    ],
)
def test_a_miss_names_the_nearest_sites(text: str, near: str) -> None:
    with pytest.raises(SiteError, match=near):
        Site.parse(text)


def test_what_a_site_cannot_be() -> None:
    with pytest.raises(SiteError, match="needs a layer"):
        Site("z")
    with pytest.raises(SiteError, match="has no layer"):
        Site("embed", 3)
    with pytest.raises(SiteError, match="no head axis"):
        Site("resid_post", 3, heads=1)
    with pytest.raises(SiteError, match="per_query_head"):
        Site("q", 3, per_query_head=True)


def test_kinds_stand_in_the_order_of_a_forward_pass() -> None:
    late = Site("final_norm").order
    assert Site("embed").order < Site("resid_pre", 0).order < Site("pattern", 0).order < Site("resid_post", 0).order
    assert Site("resid_post", 0).order < Site("resid_pre", 1).order < late < Site("logits").order


@pytest.mark.parametrize("name", ["mechinterp", "mechinterp.sites", "mechinterp.errors"])
def test_importing_does_not_import_torch(name: str) -> None:
    code = f"import sys, {name}; bad = {{'torch', 'transformers', 'numpy'}} & set(sys.modules); assert not bad, bad"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
