//! Other limits for a container as it runs.
//!
//! They stand in two places, the container's own group and ours around it, and the kernel (v1) takes no quota for a group
//! beyond that of the one around it. So ours is widened first, the engine changes its own, and ours is narrowed last.
//! Memory shrinks in ours first, which refuses what is in use before anything has changed.

use std::sync::Arc;

use optimus_common::AllocId;
use optimus_common::reason::Reason;
use optimus_common::spec::Resources;

use super::create;
use super::engine::CALL_MAX;
use super::record::container_name;
use super::{Shared, off_thread};

impl Shared {
    pub(super) async fn resize(self: &Arc<Self>, alloc: AllocId, attempt: u32, wanted: Resources) -> Result<(), Reason> {
        let failed = |why: String| Reason::LimitNotEnforceable { what: "the container's limits".into(), why };
        let name = container_name(alloc, attempt);
        let found = self.inspect(&name).await.map_err(|e| failed(e.to_string()))?;
        let quota = found.host_config.and_then(|host| host.cpu_quota).filter(|quota| *quota > 0);
        let widest = quota.map_or(wanted.cpu, |quota| create::cores(quota).max(wanted.cpu));
        self.resize_group(alloc, attempt, Resources { cpu: widest, ..wanted }).await?;
        let body = create::update(&wanted);
        let done = self.engine.call(CALL_MAX, |docker| async move { docker.update_container(&name, body).await }).await;
        done.map_err(|e| failed(e.to_string()))?;
        self.resize_group(alloc, attempt, wanted).await
    }

    async fn resize_group(self: &Arc<Self>, alloc: AllocId, attempt: u32, limits: Resources) -> Result<(), Reason> {
        let this = Arc::clone(self);
        off_thread(move || Ok(this.enforcer.resize(alloc, attempt, &limits)))
            .await
            .unwrap_or_else(|error| Err(Reason::LimitNotEnforceable { what: "limits".into(), why: error.to_string() }))
    }
}
