//! The reconciliation of pods, with workers that the test plays.

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
    path::Path,
    sync::Arc,
};

use mesh_agent::{
    kernel::{Kernel, NetnsCookie},
    pods::{Netns, PodListeners, PodStatus, Pods, WorkerCommand},
};
use mesh_api::{
    identity::TrustDomain,
    workload::{ObjectName, Workload},
};
use tokio::sync::mpsc;

use crate::world::{World, accept, close, run_in};

/// Commands that a worker's queue holds.
pub const COMMANDS_MAX: usize = 16;

pub fn workload(world: &World, name: &str) -> Workload {
    let domain = TrustDomain::new("cluster.local").unwrap();
    Workload {
        name: ObjectName::new("shop", name),
        app: name.into(),
        version: "".into(),
        identity: mesh_api::identity::SpiffeId::workload(&domain, "shop", name).unwrap(),
        node: "node-1".into(),
        node_addresses: vec![world.outside_ip(false), world.outside_ip(true)],
        addresses: vec![world.pod_ip(false), world.pod_ip(true)],
        labels: Default::default(),
        enrolled: true,
        ready: true,
        netns: Some(world.netns_path().to_str().unwrap().into()),
        ports: Vec::new(),
        probe_ports: Vec::new(),
        exclude_inbound_ports: Vec::new(),
        exclude_outbound_ports: Vec::new(),
        uid: "".into(),
        host_network: false,
        zone: "".into(),
    }
}

/// A worker that the test plays: it confirms what it is told to serve, and keeps it.
pub struct Worker {
    pub commands: mpsc::Receiver<WorkerCommand>,
}

/// What a worker was told.
enum Told {
    Serve(Box<PodListeners>),
    Retire(NetnsCookie),
}

impl Worker {
    async fn told(&mut self) -> Told {
        match self.commands.recv().await.unwrap() {
            WorkerCommand::Serve(listeners) => Told::Serve(Box::new(listeners)),
            WorkerCommand::Retire(cookie) => Told::Retire(cookie),
            WorkerCommand::Drain(_) => panic!("nobody drains"),
        }
    }

    /// Serves the next pod: confirms and gives its listeners.
    async fn serve(&mut self) -> (Vec<std::net::TcpListener>, Vec<std::net::TcpListener>) {
        let Told::Serve(listeners) = self.told().await else {
            panic!("nothing to serve")
        };
        let PodListeners {
            outbound,
            inbound,
            serving,
            ..
        } = *listeners;
        serving.confirm();
        for listener in outbound.iter().chain(&inbound) {
            listener.set_nonblocking(false).unwrap();
        }
        (outbound, inbound)
    }
}

pub fn pods(kernel: &Arc<Kernel>, workers: usize) -> (Pods, Vec<Worker>) {
    let (senders, workers) = (0..workers)
        .map(|_| {
            let (sender, commands) = mpsc::channel(COMMANDS_MAX);
            (sender, Worker { commands })
        })
        .unzip();
    (Pods::new(kernel.clone(), senders).unwrap(), workers)
}

pub fn status(pods: &Pods) -> PodStatus {
    let statuses = pods.statuses();
    assert_eq!(statuses.len(), 1);
    statuses.into_iter().next().unwrap()
}

/// Reconciles while every worker serves one pod; their listeners.
pub async fn reconcile_and_serve(
    pods: &mut Pods,
    workers: &mut [Worker],
    wanted: &[Arc<Workload>],
) -> (Vec<std::net::TcpListener>, Vec<std::net::TcpListener>) {
    let serving = async {
        let (mut outbound, mut inbound) = (Vec::new(), Vec::new());
        for worker in workers {
            let (out, inward) = worker.serve().await;
            outbound.extend(out);
            inbound.extend(inward);
        }
        (outbound, inbound)
    };
    tokio::join!(pods.reconcile(wanted), serving).1
}

#[tokio::test]
async fn a_pod_is_captured_when_every_worker_serves_it_and_direct_again_when_it_is_not_wanted() {
    let mut world = World::new();
    let kernel = world.take_kernel();
    let (mut pods, mut workers) = pods(&kernel, 2);
    let wanted = Arc::new(workload(&world, "cart"));
    let (outbound, inbound) = reconcile_and_serve(&mut pods, &mut workers, std::slice::from_ref(&wanted)).await;
    assert_eq!(outbound.len(), 4, "two workers, two families");
    let status_now = status(&pods);
    assert!(
        status_now.enrolled && status_now.captured && pods.is_settled(),
        "{status_now:?}"
    );
    let ports: Vec<u16> = outbound
        .iter()
        .map(|listener| listener.local_addr().unwrap().port())
        .collect();
    assert_eq!(ports, [15001; 4]);

    let destination: SocketAddr = "203.0.113.7:80".parse().unwrap();
    world.in_pod(move || TcpStream::connect(destination)).unwrap();
    let (_, source) = accept(&outbound);
    assert_eq!(
        kernel.take_original_destination(world.cookie(), source),
        Some(destination)
    );
    let ip = world.pod_ip(true);
    world.outside(move || TcpStream::connect((ip, 80))).unwrap();
    accept(&inbound);

    let directory = pods.directory();
    let pod = directory.by_name(&wanted.name).unwrap();
    assert_eq!(pod.cookie(), world.cookie());
    assert!(Arc::ptr_eq(&pod, &directory.by_address(ip).unwrap()));
    assert!(Arc::ptr_eq(&pod, &directory.by_cookie(pod.cookie()).unwrap()));

    // The same again changes nothing and bothers nobody.
    pods.reconcile(std::slice::from_ref(&wanted)).await;
    assert!(workers.iter_mut().all(|worker| worker.commands.try_recv().is_err()));

    let mut disabled = (*wanted).clone();
    disabled.enrolled = false;
    pods.reconcile(&[Arc::new(disabled)]).await;
    for worker in &mut workers {
        assert!(matches!(worker.told().await, Told::Retire(cookie) if cookie == world.cookie()));
    }
    let status_now = status(&pods);
    assert!(!status_now.enrolled && !status_now.captured && pods.is_settled());
    assert!(directory.by_name(&wanted.name).is_none() && kernel.enrolled().unwrap().is_empty());
}

#[tokio::test]
async fn a_pod_whose_worker_does_not_serve_is_guarded_but_not_called_captured() {
    let mut world = World::new();
    let kernel = world.take_kernel();
    let (mut pods, mut workers) = pods(&kernel, 2);
    let wanted = [Arc::new(workload(&world, "cart"))];
    let (first, second) = workers.split_at_mut(1);
    let serving = async {
        let kept = first[0].serve().await;
        // The second one drops its listeners unconfirmed.
        close(second[0].told().await);
        kept
    };
    let (_, kept) = tokio::join!(pods.reconcile(&wanted), serving);
    let status_now = status(&pods);
    assert!(!status_now.captured && !pods.is_settled(), "{status_now:?}");
    assert_eq!(status_now.reason.as_deref(), Some("worker 1 does not serve the pod"));
    world.in_pod(|| TcpStream::connect("203.0.113.7:80")).unwrap();
    accept(&kept.0);

    let (_, again) = tokio::join!(pods.reconcile(&wanted), second[0].serve());
    assert!(status(&pods).captured, "{:?}", status(&pods));
    let ports: Vec<u16> = again
        .0
        .iter()
        .map(|listener| listener.local_addr().unwrap().port())
        .collect();
    assert_eq!(ports, [15001, 15001], "it joins the groups that are there");
    assert!(first[0].commands.try_recv().is_err(), "who serves is not asked again");
}

#[tokio::test]
async fn a_change_reaches_the_kernel_and_touches_no_connection() {
    let mut world = World::new();
    let kernel = world.take_kernel();
    let (mut pods, mut workers) = pods(&kernel, 1);
    let mut wanted = workload(&world, "cart");
    let (outbound, _inbound) = reconcile_and_serve(&mut pods, &mut workers, &[Arc::new(wanted.clone())]).await;
    let mut live = world.in_pod(|| TcpStream::connect("203.0.113.7:80")).unwrap();
    let (mut accepted, _) = accept(&outbound);
    let pod = pods.directory().by_name(&wanted.name).unwrap();

    let ip = world.outside_ip(false);
    let outside = world.outside(move || std::net::TcpListener::bind((ip, 0))).unwrap();
    let address = outside.local_addr().unwrap();
    wanted.exclude_outbound_ports = vec![address.port()];
    wanted.addresses.truncate(1);
    pods.reconcile(&[Arc::new(wanted.clone())]).await;
    assert!(status(&pods).captured);
    assert_eq!(
        pod.workload().exclude_outbound_ports,
        [address.port()],
        "who holds the pod sees the change"
    );
    world.in_pod(move || TcpStream::connect(address)).unwrap();
    accept(std::slice::from_ref(&outside));
    let steered = kernel.gauges().into_iter().find(|gauge| gauge.map == "STEER").unwrap();
    assert_eq!(steered.entries, 1, "the address that went is not steered");

    accepted.write_all(b"still here").unwrap();
    drop(accepted);
    let mut text = String::new();
    live.read_to_string(&mut text).unwrap();
    assert_eq!(text, "still here");
}

#[tokio::test]
async fn the_nodes_addresses_come_with_the_view() {
    let mut world = World::with(|config| config.node_addresses.clear());
    let kernel = world.take_kernel();
    let (mut pods, mut workers) = pods(&kernel, 1);
    let mut wanted = workload(&world, "cart");
    wanted.probe_ports = vec![9001];
    let _listeners = reconcile_and_serve(&mut pods, &mut workers, &[Arc::new(wanted)]).await;
    let ip = world.pod_ip(true);
    let application = world.in_pod(move || std::net::TcpListener::bind((ip, 9001))).unwrap();
    world.outside(move || TcpStream::connect((ip, 9001))).unwrap();
    accept(std::slice::from_ref(&application));
}

#[tokio::test]
async fn another_pod_under_the_same_name_is_captured_anew() {
    let mut world = World::new();
    let successor = World::new();
    let kernel = world.take_kernel();
    let place = tempfile::tempdir().unwrap();
    let path = place.path().join("netns");
    std::os::unix::fs::symlink(world.netns_path(), &path).unwrap();
    let (mut pods, mut workers) = pods(&kernel, 1);
    let mut wanted = workload(&world, "cart");
    wanted.netns = Some(path.to_str().unwrap().into());
    let _first = reconcile_and_serve(&mut pods, &mut workers, &[Arc::new(wanted.clone())]).await;

    // The file goes before the pod does: that alone changes nothing.
    std::fs::remove_file(&path).unwrap();
    pods.reconcile(&[Arc::new(wanted.clone())]).await;
    assert_eq!(
        kernel.enrolled().unwrap().into_iter().collect::<Vec<_>>(),
        [world.cookie()]
    );

    std::os::unix::fs::symlink(successor.netns_path(), &path).unwrap();
    let wanted = [Arc::new(wanted)];
    let serving = async {
        assert!(matches!(workers[0].told().await, Told::Retire(cookie) if cookie == world.cookie()));
        workers[0].serve().await
    };
    let (_, (outbound, _inbound)) = tokio::join!(pods.reconcile(&wanted), serving);
    assert_eq!(
        kernel.enrolled().unwrap().into_iter().collect::<Vec<_>>(),
        [successor.cookie()]
    );
    successor.in_pod(|| TcpStream::connect("203.0.113.7:80")).unwrap();
    accept(&outbound);
    assert_eq!(
        pods.directory().by_name(&wanted[0].name).unwrap().cookie(),
        successor.cookie()
    );
}

#[tokio::test]
async fn a_taken_port_is_left_to_its_owner_and_ipv6_may_be_absent() {
    let mut world = World::new();
    let kernel = world.take_kernel();
    world.in_pod(|| std::fs::write("/proc/sys/net/ipv6/conf/all/disable_ipv6", "1").unwrap());
    let taken = world.in_pod(|| std::net::TcpListener::bind("0.0.0.0:15001")).unwrap();
    let (mut pods, mut workers) = pods(&kernel, 2);
    let mut wanted = workload(&world, "cart");
    wanted.addresses.truncate(1);
    let (outbound, inbound) = reconcile_and_serve(&mut pods, &mut workers, &[Arc::new(wanted)]).await;
    assert_eq!((outbound.len(), inbound.len()), (2, 2), "no listeners on ::1");
    assert!(
        outbound
            .iter()
            .all(|listener| listener.local_addr().unwrap().port() != 15001)
    );
    assert!(status(&pods).captured);
    world.in_pod(|| TcpStream::connect("203.0.113.7:80")).unwrap();
    accept(&outbound);
    drop(taken);
}

#[tokio::test]
async fn a_pod_that_cannot_be_captured_says_why() {
    let mut world = World::new();
    let kernel = world.take_kernel();
    let (mut pods, mut workers) = pods(&kernel, 1);
    let good = workload(&world, "cart");
    type Change = fn(&mut Workload);
    let cases: [(&str, Change); 5] = [
        ("the pod names no network namespace", |w| w.netns = None),
        (
            "network namespace /run/netns/nmt-never-was: No such file or directory (os error 2)",
            |w| {
                w.netns = Some("/run/netns/nmt-never-was".into());
            },
        ),
        (
            "network namespace /proc/self/status: Invalid argument (os error 22)",
            |w| {
                w.netns = Some("/proc/self/status".into());
            },
        ),
        ("the pod shares the node's network namespace", |w| {
            w.netns = Some("/proc/self/ns/net".into())
        }),
        ("the pod has no address", |w| w.addresses.clear()),
    ];
    for (reason, change) in cases {
        let mut wanted = good.clone();
        change(&mut wanted);
        pods.reconcile(&[Arc::new(wanted)]).await;
        let status_now = status(&pods);
        assert!(status_now.enrolled && !status_now.captured && !pods.is_settled());
        assert_eq!(status_now.reason.as_deref(), Some(reason));
    }
    // The next reconciliation finds it well.
    let twin = Arc::new(workload(&world, "twin"));
    let _listeners = reconcile_and_serve(&mut pods, &mut workers, &[Arc::new(good), twin]).await;
    let statuses = pods.statuses();
    assert!(statuses[0].captured && !statuses[1].captured);
    assert_eq!(
        statuses[1].reason.as_deref(),
        Some("pod shop/cart has the same network namespace")
    );
}

#[tokio::test]
async fn a_new_agent_keeps_wanted_pods_guarded_and_retires_the_others() {
    let mut world = World::new();
    let stranger = World::new();
    let mut kernel = world.take_kernel();
    let (mut first, mut workers) = pods(&kernel, 1);
    let cart = Arc::new(workload(&world, "cart"));
    let mut other = workload(&stranger, "other");
    other.netns = Some(stranger.netns_path().to_str().unwrap().into());
    let both = [cart.clone(), Arc::new(other)];
    let serve_both = async { (workers[0].serve().await, workers[0].serve().await) };
    let (_, listeners) = tokio::join!(first.reconcile(&both), serve_both);
    close((listeners, first, workers));
    drop(kernel);

    world.attach();
    kernel = world.take_kernel();
    assert_eq!(kernel.enrolled().unwrap().len(), 2);
    let (mut second, mut workers) = pods(&kernel, 1);
    // As long as a wanted pod cannot be opened, nothing is retired: it may be the one.
    let mut lost = (*cart).clone();
    lost.netns = Some("/run/netns/nmt-never-was".into());
    second.reconcile(&[Arc::new(lost)]).await;
    assert_eq!(kernel.enrolled().unwrap().len(), 2);
    let (outbound, _inbound) = reconcile_and_serve(&mut second, &mut workers, &[cart]).await;
    assert_eq!(
        kernel.enrolled().unwrap().into_iter().collect::<Vec<_>>(),
        [world.cookie()]
    );
    world.in_pod(|| TcpStream::connect("203.0.113.7:80")).unwrap();
    accept(&outbound);
}

#[test]
fn a_thread_comes_back_from_a_namespace_also_when_the_closure_panics() {
    let world = World::new();
    let path = world.netns_path();
    run_in(Path::new("/proc/self/ns/net"), move || {
        let home = Netns::current().unwrap().cookie();
        let pod = Netns::open(&path).unwrap();
        assert_ne!(home, pod.cookie());
        let inside = pod.run(|| Netns::current().unwrap().cookie()).unwrap();
        assert_eq!(inside, pod.cookie());
        assert_eq!(Netns::current().unwrap().cookie(), home);
        let panicking = std::panic::AssertUnwindSafe(|| pod.run(|| panic!("inside")).unwrap());
        let panicked: std::thread::Result<()> = std::panic::catch_unwind(panicking);
        assert!(panicked.is_err());
        assert_eq!(Netns::current().unwrap().cookie(), home);
    });
}
