//! Links: which program is attached where, pinned so that it stays when the agent dies.
//!
//! A cgroup link's pin is `link-<program>`, a network namespace's is `steer-<cookie>`. A pinned link that is found is
//! updated in place, so that there is no moment without a program; one whose target is gone is removed.

use std::{
    collections::BTreeSet,
    fs, io,
    os::fd::{AsFd, BorrowedFd},
    path::Path,
};

use mesh_abi::maps;

use super::{
    KernelError, NetnsCookie,
    sys::{self, AttachType, LinkTarget},
};

const STEER_PREFIX: &str = "steer-";
const CGROUP_PREFIX: &str = "link-";

/// The pin name of a pod's steering link.
pub fn steer_pin(cookie: NetnsCookie) -> String {
    format!("{STEER_PREFIX}{cookie}")
}

fn failed(at: &Path) -> impl Fn(io::Error) -> KernelError {
    let name = at.file_name().unwrap_or_default().to_string_lossy().into_owned();
    move |source| KernelError::Link {
        name: name.clone(),
        source,
    }
}

/// Attaches a program to the cgroup, or swaps it into the link that is pinned there.
pub fn cgroup(
    pin_dir: &Path,
    program_name: &str,
    program: &impl AsFd,
    attach_type: AttachType,
    cgroup: (&impl AsFd, u64),
) -> Result<(), KernelError> {
    let at = pin_dir.join(format!("{CGROUP_PREFIX}{program_name}"));
    let (target, id) = cgroup;
    place(&at, program, target, attach_type, |found| {
        found == LinkTarget::Cgroup(id)
    })
}

/// Attaches the steering program to a pod's network namespace, or swaps it into the link that is pinned there.
pub fn steer(
    pin_dir: &Path,
    cookie: NetnsCookie,
    program: &impl AsFd,
    netns: BorrowedFd<'_>,
) -> Result<(), KernelError> {
    let at = pin_dir.join(steer_pin(cookie));
    // A cookie is never used again: a link that is alive under this name is in this very namespace.
    place(
        &at,
        program,
        &netns,
        AttachType::SkLookup,
        |found| matches!(found, LinkTarget::Netns(inode) if inode != 0),
    )
}

fn place(
    at: &Path,
    program: &impl AsFd,
    target: &impl AsFd,
    attach_type: AttachType,
    is_right: impl Fn(LinkTarget) -> bool,
) -> Result<(), KernelError> {
    let failed = failed(at);
    if let Some(link) = sys::open_pinned(at).map_err(&failed)? {
        if is_right(sys::link_target(&link).map_err(&failed)?) {
            return sys::update_link(&link, program).map_err(failed);
        }
        unpin(at)?;
    }
    let link = sys::link(program, target, attach_type).map_err(&failed)?;
    sys::pin(&link, at).map_err(failed)
}

/// Detaches a pinned link and removes the pin; one that is not there is no error.
pub fn unpin(at: &Path) -> Result<(), KernelError> {
    let failed = failed(at);
    let Some(link) = sys::open_pinned(at).map_err(&failed)? else {
        return Ok(());
    };
    // A link whose target is gone is detached already (ENOLINK): only the pin is left to remove.
    if let Err(error) = sys::detach_link(&link)
        && error.raw_os_error() != Some(libc::ENOLINK)
    {
        return Err(failed(error));
    }
    fs::remove_file(at).map_err(failed)
}

fn pins(pin_dir: &Path) -> Result<Vec<String>, KernelError> {
    let bpffs = |source| KernelError::Bpffs {
        path: pin_dir.to_owned(),
        source,
    };
    let mut names = Vec::new();
    for entry in fs::read_dir(pin_dir).map_err(bpffs)? {
        names.extend(entry.map_err(bpffs)?.file_name().into_string().ok());
    }
    Ok(names)
}

/// Points every steering link at the program and removes those whose network namespace is gone; returns the living.
pub fn update_steering(pin_dir: &Path, program: &impl AsFd) -> Result<BTreeSet<NetnsCookie>, KernelError> {
    let mut alive = BTreeSet::new();
    for name in pins(pin_dir)? {
        let Some(cookie) = name.strip_prefix(STEER_PREFIX).and_then(|cookie| cookie.parse().ok()) else {
            continue;
        };
        let at = pin_dir.join(&name);
        let failed = failed(&at);
        let Some(link) = sys::open_pinned(&at).map_err(&failed)? else {
            continue;
        };
        match sys::link_target(&link).map_err(&failed)? {
            LinkTarget::Netns(inode) if inode != 0 => {
                sys::update_link(&link, program).map_err(&failed)?;
                alive.insert(NetnsCookie(cookie));
            }
            _ => unpin(&at)?,
        }
    }
    Ok(alive)
}

/// Detaches and unpins everything of ours in the directory, links before maps, and removes it.
pub fn remove(pin_dir: &Path) -> Result<(), KernelError> {
    if !pin_dir.exists() {
        return Ok(());
    }
    let bpffs = |source| KernelError::Bpffs {
        path: pin_dir.to_owned(),
        source,
    };
    let names = pins(pin_dir)?;
    // Steering first: while it goes, a source's capture still protects what it sends.
    for prefix in [STEER_PREFIX, CGROUP_PREFIX] {
        for name in names.iter().filter(|name| name.starts_with(prefix)) {
            unpin(&pin_dir.join(name))?;
        }
    }
    for name in names.iter().filter(|name| maps::ALL.contains(&name.as_str())) {
        fs::remove_file(pin_dir.join(name)).map_err(bpffs)?;
    }
    match fs::remove_dir(pin_dir) {
        // A mount point, or a directory that others use too: what was ours in it is gone.
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::ResourceBusy | io::ErrorKind::DirectoryNotEmpty
            ) =>
        {
            Ok(())
        }
        result => result.map_err(bpffs),
    }
}
