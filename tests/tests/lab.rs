//! The lab without a mesh: namespaces, addresses, names, processes, probes, and that nothing stays behind.
//! If these fail, no other end-to-end test says anything about the mesh.

use std::{path::Path, process::Command, time::Duration};

use anyhow::Result;
use mesh_tests::{Lab, LabConfig, Place, cgroup, lab, netns, plan, state, until};

const WEB: &str = r#"
apiVersion: v1
kind: Namespace
metadata: {name: shop}
---
apiVersion: v1
kind: Pod
metadata: {name: client, namespace: shop, labels: {app: client}}
spec:
  nodeName: node-1
  containers: [{name: main, command: [sleep, infinity]}]
---
apiVersion: v1
kind: Pod
metadata: {name: web-1, namespace: shop, labels: {app: web}}
spec:
  nodeName: node-1
  containers:
  - name: main
    command: [python3, -m, http.server, --bind, "::", "$(PORT)"]
    env: [{name: PORT, value: "8080"}, {name: NODE, valueFrom: {fieldRef: {fieldPath: spec.nodeName}}}]
    ports: [{name: http, containerPort: 8080}]
    readinessProbe: {httpGet: {path: /, port: http}}
---
apiVersion: v1
kind: Pod
metadata: {name: web-2, namespace: shop, labels: {app: web}}
spec:
  nodeName: node-2
  containers:
  - name: main
    command: [python3, -m, http.server, --bind, "::", "8080"]
    ports: [{name: http, containerPort: 8080}]
    readinessProbe: {tcpSocket: {port: 8080}}
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop}
spec: {selector: {app: web}, ipFamilyPolicy: PreferDualStack, ports: [{port: 80, targetPort: http}]}
---
apiVersion: v1
kind: Service
metadata: {name: webs, namespace: shop}
spec: {selector: {app: web}, clusterIP: None, ports: [{port: 8080}]}
"#;

fn fetch(lab: &Lab, url: &str) -> Result<String> {
    lab.exec(
        "shop/client",
        &[
            "curl",
            "-sS",
            "-o",
            "/dev/null",
            "-w",
            "%{http_code}",
            "--max-time",
            "5",
            url,
        ],
    )?
    .ok()
}

#[test]
fn pods_reach_each_other_by_address_and_by_name() -> Result<()> {
    let lab = Lab::up(LabConfig::test("reach").unmeshed().manifest(WEB))?;
    for pod in ["shop/web-1", "shop/web-2"] {
        assert_eq!(
            fetch(&lab, &format!("http://{}:8080/", lab.pod_ip(pod)?))?,
            "200",
            "{pod}"
        );
        assert_eq!(
            fetch(&lab, &format!("http://[{}]:8080/", lab.pod_ip6(pod)?))?,
            "200",
            "{pod}"
        );
    }
    let service = lab.state()?.service("shop/web")?.addresses.clone();
    assert_eq!(service.len(), 2, "a dual-stack service has two addresses");
    for name in ["web", "web.shop", "web.shop.svc", "web.shop.svc.cluster.local"] {
        assert_eq!(fetch(&lab, &format!("http://{name}/"))?, "200", "{name}");
    }
    assert_eq!(fetch(&lab, &format!("http://[{}]/", service[1]))?, "200");
    assert_eq!(
        fetch(&lab, "http://webs:8080/")?,
        "200",
        "a headless service leads to its pods"
    );
    let unknown = lab.exec("shop/client", &["curl", "-sS", "--max-time", "5", "http://nowhere/"])?;
    assert_eq!(unknown.code(), 6, "curl cannot resolve the name: {unknown}");
    lab.down()
}

#[test]
fn a_pod_has_its_own_names_cgroup_and_environment() -> Result<()> {
    let lab = Lab::up(LabConfig::test("pod").unmeshed().manifest(WEB))?;
    let hosts = lab.shell("shop/web-1", "cat /etc/hosts")?;
    let own = lab.pod_ip("shop/web-1")?;
    assert!(hosts.contains(&format!("{own} web-1\n")), "{hosts}");
    assert!(
        !std::fs::read_to_string("/etc/hosts")?.contains("web-1"),
        "the machine keeps its own"
    );
    let group = lab.shell("shop/web-1", "grep ^0:: /proc/self/cgroup")?;
    let want = format!("0::/nodemesh-lab/{}/node-1/shop_web-1", lab.name());
    assert!(group.trim().ends_with(&want), "{group}");
    assert_eq!(lab.shell("shop/web-1", "echo $PORT $NODE")?.trim(), "8080 node-1");
    let addresses = lab.shell("shop/web-1", "ip -o addr show dev eth0 scope global")?;
    assert!(addresses.contains(&own.to_string()), "{addresses}");
    // Exit codes pass through.
    assert_eq!(lab.exec("shop/client", &["sh", "-c", "exit 7"])?.code(), 7);
    // What runs on a node is within what the node's agent looks at, and in no pod.
    let host = lab
        .exec_in(Place::Node("node-1"), &["cat", "/proc/self/cgroup"])?
        .ok()?;
    assert!(host.contains(&format!("{}/node-1/host\n", lab.name())), "{host}");
    lab.down()
}

#[test]
fn pods_come_and_go() -> Result<()> {
    let lab = Lab::up(LabConfig::test("pods").unmeshed().manifest(WEB))?;
    lab.apply(
        "{apiVersion: v1, kind: Pod, metadata: {name: late, namespace: shop, labels: {app: late}}, spec: {containers: \
         [{name: main, command: [python3, -m, http.server, '9090'], readinessProbe: {tcpSocket: {port: 9090}}}]}}\n---\n\
         {apiVersion: v1, kind: Service, metadata: {name: late, namespace: shop}, spec: {selector: {app: late}, ports: \
         [{port: 90, targetPort: 9090}]}}",
    )?;
    assert_eq!(
        fetch(&lab, "http://late:90/")?,
        "200",
        "a running pod learns the new name"
    );
    let process = lab.shell("shop/late", "cat /sys/class/net/eth0/ifindex; echo")?;
    assert!(!process.is_empty());
    lab.delete_pod("shop/late")?;
    assert!(lab.pod("shop/late").is_err());
    assert!(!netns::path(&plan::pod_netns(lab.name(), "shop", "late")).exists());
    assert!(fetch(&lab, "http://late:90/").is_err());
    lab.down()
}

#[test]
fn a_container_that_ends_is_started_again() -> Result<()> {
    let pod = |name: &str, policy: &str| {
        format!(
            "{{apiVersion: v1, kind: Pod, metadata: {{name: {name}}}, spec: {{restartPolicy: {policy}, containers: \
             [{{name: main, command: [sh, -c, 'echo run; exit 3']}}]}}}}\n---\n"
        )
    };
    let manifest = pod("always", "Always") + &pod("never", "Never");
    let lab = Lab::up(LabConfig::test("restart").unmeshed().nodes(1).manifest(manifest))?;
    until("the second run", Duration::from_secs(10), || {
        Ok((lab.logs("default/always")?.matches("run\n").count() >= 2).then_some(()))
    })?;
    assert_eq!(lab.logs("default/never")?.matches("run\n").count(), 1);
    lab.down()
}

#[test]
fn two_labs_at_once_and_nothing_stays() -> Result<()> {
    let first = Lab::up(LabConfig::test("one").unmeshed().manifest(WEB))?;
    let second = Lab::up(LabConfig::test("two").unmeshed().manifest(WEB))?;
    assert_ne!(first.pod_ip("shop/web-1")?, second.pod_ip("shop/web-1")?);
    assert_eq!(fetch(&first, "http://web/")?, "200");
    let name = second.name().to_string();
    drop(second);
    assert_nothing_left(&name)?;
    assert_eq!(fetch(&first, "http://web/")?, "200", "the other lab goes on");
    let name = first.name().to_string();
    first.down()?;
    assert_nothing_left(&name)
}

#[test]
fn a_lab_whose_start_fails_leaves_nothing() -> Result<()> {
    let config = LabConfig::test("broken")
        .unmeshed()
        .manifest("{apiVersion: v1, kind: Pod, metadata: {name: lost}, spec: {nodeName: nowhere, containers: []}}");
    let name = config.name.clone();
    let error = Lab::up(config).expect_err("no such node");
    assert!(format!("{error:#}").contains("no node \"nowhere\""), "{error:#}");
    assert_nothing_left(&name)
}

#[test]
fn a_lab_can_be_removed_by_name_and_its_name_is_taken_once() -> Result<()> {
    let config = LabConfig::test("byname").unmeshed().manifest(WEB);
    let name = config.name.clone();
    let lab = Lab::up(config.clone())?;
    let error = Lab::up(config).expect_err("the name is taken");
    assert!(error.to_string().contains("exists already"), "{error:#}");
    // As after a kill -9 of the owner: nothing is known but what is recorded.
    let _never_dropped = std::mem::ManuallyDrop::new(lab);
    let opened = Lab::open(&name)?;
    assert_eq!(fetch(&opened, "http://web/")?, "200");
    lab::remove(&name)?;
    assert_nothing_left(&name)
}

#[test]
fn the_fabric_shows_what_passes_between_nodes() -> Result<()> {
    let lab = Lab::up(LabConfig::test("wire").unmeshed().manifest(WEB))?;
    let capture = lab.capture("tcp port 8080")?;
    let marker = "marker-in-the-clear";
    for pod in ["shop/web-1", "shop/web-2"] {
        let url = format!("http://{}:8080/?{marker}", lab.pod_ip(pod)?);
        assert_eq!(fetch(&lab, &url)?, "200");
    }
    let bytes = capture.stop()?;
    let request = format!("GET /?{marker} ");
    let seen = bytes
        .windows(request.len())
        .filter(|window| *window == request.as_bytes())
        .count();
    assert_eq!(seen, 1, "cross-node traffic is seen, same-node traffic is not");
    lab.down()
}

fn assert_nothing_left(name: &str) -> Result<()> {
    let prefix = plan::prefix(name);
    assert_eq!(netns::list(&prefix), Vec::<String>::new());
    assert!(!state::directory(name).exists());
    assert!(!cgroup::of_lab(name)?.exists());
    let mounts = std::fs::read_to_string("/proc/self/mountinfo")?;
    assert!(!mounts.contains(&prefix), "{mounts}");
    let etc = Path::new("/etc/netns");
    let names = etc
        .read_dir()
        .into_iter()
        .flatten()
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    assert_eq!(names.filter(|file| file.starts_with(&prefix)).count(), 0);
    let processes = Command::new("pgrep").args(["-f", &prefix]).output()?;
    assert_eq!(String::from_utf8_lossy(&processes.stdout), "");
    Ok(())
}
