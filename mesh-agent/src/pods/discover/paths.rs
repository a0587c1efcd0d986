//! Which pod a cgroup belongs to, read from its name alone.
//!
//! Container runtimes and cgroup drivers each have their own shape; the kubelet's part of it, `kubepods` and the pod's
//! UID, is the same everywhere. Pure: nothing here touches a file system. What is not certainly a pod's is nobody's.

use std::{fmt, sync::Arc};

/// The shortest UID: that of a static pod is a hash of its manifest.
const UID_MIN: usize = 32;
/// The longest UID.
const UID_MAX: usize = 63;

/// A pod's UID as the API server writes it: lower case, with dashes.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PodUid(Arc<str>);

/// What a directory below a pod's cgroup is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Member<'a> {
    /// A container's, the sandbox's included.
    Container(&'a str),
    /// The runtime's own process beside a container (conmon): it is in the node's network namespace.
    Monitor,
}

impl PodUid {
    /// A UID in either spelling: systemd slices have underscores in place of dashes.
    pub fn new(text: &str) -> Option<PodUid> {
        let is_good = (UID_MIN..=UID_MAX).contains(&text.len())
            && text.bytes().all(|b| b.is_ascii_hexdigit() || matches!(b, b'-' | b'_'))
            && text.starts_with(|c: char| c.is_ascii_hexdigit());
        is_good.then(|| PodUid(text.replace('_', "-").to_ascii_lowercase().into()))
    }

    /// Whether it is that of a static pod: a hash, which the API server does not know. There the pod has another UID.
    pub fn is_static(&self) -> bool {
        !self.0.contains('-')
    }

    /// The UID's text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for PodUid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Whether a directory of that name holds all of a kubelet's pods.
pub fn is_kubepods(name: &str) -> bool {
    matches!(name, "kubepods" | "kubepods.slice") || name.ends_with("-kubepods.slice")
}

/// Whether a directory of that name, directly below `kubepods`, holds the pods of one quality of service.
pub fn is_class(name: &str) -> bool {
    matches!(name, "burstable" | "besteffort")
        || name.ends_with("kubepods-burstable.slice")
        || name.ends_with("kubepods-besteffort.slice")
}

/// The pod whose cgroup has that name: `pod<uid>`, or `…kubepods-burstable-pod<uid>.slice`.
pub fn pod_of_name(name: &str) -> Option<PodUid> {
    let (before, uid) = name.strip_suffix(".slice").unwrap_or(name).rsplit_once("pod")?;
    let is_pods = before.is_empty() || before.contains("kubepods") && before.ends_with('-');
    is_pods.then(|| PodUid::new(uid)).flatten()
}

/// What the directory of that name in a pod's cgroup is.
pub fn member_of_name(name: &str) -> Member<'_> {
    let name = name.strip_suffix(".scope").unwrap_or(name);
    if name.starts_with("crio-conmon-") {
        return Member::Monitor;
    }
    let prefixes = ["cri-containerd-", "crio-", "docker-"];
    Member::Container(
        prefixes
            .iter()
            .find_map(|prefix| name.strip_prefix(prefix))
            .unwrap_or(name),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    const UID: &str = "0a3f7c52-9d1e-4b6a-8f00-1234567890ab";
    const ID: &str = "4f5c1e0d2b3a49586776859403a2b1c0d9e8f7a6b5c4d3e2f1a0b9c8d7e6f504";

    /// What the walk from a hierarchy's root finds on the way to a process's cgroup: the pod, and the member of it. In
    /// a pod that runs pods, the outer one: the inner ones are its own affair.
    fn pod_of_path(path: &str) -> Option<(PodUid, Option<Member<'_>>)> {
        let mut parts = path.split('/').filter(|part| !part.is_empty());
        parts.find(|part| is_kubepods(part))?;
        let uid = parts.by_ref().find_map(pod_of_name)?;
        Some((uid, parts.next().map(member_of_name)))
    }

    #[test]
    fn every_runtime_and_driver_is_understood() {
        let under = UID.replace('-', "_");
        let hash = "0123456789abcdef0123456789abcdef";
        let container = Some(Member::Container(ID));
        let cases = [
            // cgroupfs: containerd, each quality of service.
            (format!("/kubepods/burstable/pod{UID}/{ID}"), UID, container),
            (format!("/kubepods/besteffort/pod{UID}/{ID}"), UID, container),
            (format!("/kubepods/pod{UID}/{ID}"), UID, container),
            (format!("/kubepods/pod{UID}"), UID, None),
            // cgroupfs: CRI-O.
            (format!("/kubepods/burstable/pod{UID}/crio-{ID}"), UID, container),
            (
                format!("/kubepods/burstable/pod{UID}/crio-conmon-{ID}"),
                UID,
                Some(Member::Monitor),
            ),
            // systemd: containerd, CRI-O, Docker.
            (
                format!(
                    "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{under}.slice/cri-containerd-{ID}.scope"
                ),
                UID,
                container,
            ),
            (
                format!("/kubepods.slice/kubepods-pod{under}.slice/cri-containerd-{ID}.scope"),
                UID,
                container,
            ),
            (
                format!(
                    "/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod{under}.slice/crio-{ID}.scope"
                ),
                UID,
                container,
            ),
            (
                format!(
                    "/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod{under}.slice/crio-{ID}.scope/container"
                ),
                UID,
                container,
            ),
            (
                format!(
                    "/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod{under}.slice/crio-conmon-{ID}.scope"
                ),
                UID,
                Some(Member::Monitor),
            ),
            (
                format!(
                    "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{under}.slice/docker-{ID}.scope"
                ),
                UID,
                container,
            ),
            // A kubelet below a cgroup of its own (kind), in either driver.
            (format!("/kubelet/kubepods/burstable/pod{UID}/{ID}"), UID, container),
            (
                format!(
                    "/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-burstable.slice/kubelet-kubepods-burstable-pod{under}.slice/cri-containerd-{ID}.scope"
                ),
                UID,
                container,
            ),
            // A static pod's UID is a hash.
            (format!("/kubepods/burstable/pod{hash}/{ID}"), hash, container),
            // A pod in a pod: the outer one.
            (
                format!("/kubepods/pod{UID}/{ID}/kubelet/kubepods/pod{hash}/{ID}"),
                UID,
                container,
            ),
        ];
        for (path, uid, member) in &cases {
            let expected = PodUid::new(uid).map(|uid| (uid, *member));
            assert_eq!(pod_of_path(path), expected, "{path}");
        }
    }

    #[test]
    fn what_is_no_pods_is_nobodys() {
        let cases = [
            "/".to_owned(),
            "/kubepods".to_owned(),
            "/kubepods/burstable".to_owned(),
            "/kubepods.slice/kubepods-burstable.slice".to_owned(),
            "/system.slice/containerd.service".to_owned(),
            "/system.slice/kubelet.service".to_owned(),
            format!("/machine.slice/libpod-{ID}.scope"),
            format!("/machine.slice/libpod-conmon-{ID}.scope"),
            format!("/user.slice/pod{UID}/{ID}"),
            format!("/docker/{ID}"),
            "/kubepods/podshort/x".to_owned(),
            format!("/kubepods/pod{UID}{UID}/x"),
            format!("/kubepods/pod{}/x", UID.replace('a', "z")),
        ];
        for path in &cases {
            assert_eq!(pod_of_path(path), None, "{path}");
        }
    }

    #[test]
    fn directories_are_told_apart() {
        for (name, kubepods, class) in [
            ("kubepods", true, false),
            ("kubepods.slice", true, false),
            ("kubelet-kubepods.slice", true, false),
            ("burstable", false, true),
            ("kubepods-burstable.slice", false, true),
            ("kubelet-kubepods-besteffort.slice", false, true),
            ("system.slice", false, false),
            ("notkubepods", false, false),
        ] {
            assert_eq!((is_kubepods(name), is_class(name)), (kubepods, class), "{name}");
        }
    }
}
